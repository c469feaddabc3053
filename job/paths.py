"""Every local file name of a run. Stages find each other's results only through these names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WITHOUT_WEIGHTS = "JOB_WITHOUT_WEIGHTS"  # set to 1 in the environment of a run that only looks at its data


@dataclass(frozen=True)
class Paths:
    """The files of the run `run_id` below `output_dir`. Asking for a name creates nothing."""

    output_dir: Path
    run_id: str
    node: int = 0

    @property
    def run_dir(self) -> Path:
        """One folder per node, since nodes may share a file system."""
        first = self.output_dir / "runs" / self.run_id
        return first if self.node == 0 else first / "nodes" / str(self.node)

    def stage_dir(self, stage: str) -> Path:
        """Everything that one stage writes. Its marker is written last."""
        return self.run_dir / stage

    def marker_file(self, stage: str) -> Path:
        return self.stage_dir(stage) / "MANIFEST.json"

    # download
    @property
    def model_dir(self) -> Path:
        """The base model: links to safetensors, configuration and tokenizer files, but nothing pickled."""
        return self.stage_dir("download") / "model"

    @property
    def dataset_dir(self) -> Path:
        return self.stage_dir("download") / "dataset"

    @property
    def eval_dataset_dir(self) -> Path:
        """The evaluation dataset, if it is not the training dataset."""
        return self.stage_dir("download") / "eval_dataset"

    @property
    def earlier_adapter_dir(self) -> Path:
        """The adapter that FT_ADAPTER_NAME names: at the top of what was fetched, or in its folder `adapter`."""
        fetched = self.stage_dir("download") / "adapter"
        return fetched if (fetched / "adapter_config.json").is_file() else fetched / "adapter"

    @property
    def sources_file(self) -> Path:
        """Where the model and the datasets came from, and at which commits."""
        return self.stage_dir("download") / "sources.json"

    # prepare
    @property
    def train_data_dir(self) -> Path:
        return self.stage_dir("prepare") / "train"

    @property
    def eval_data_dir(self) -> Path:
        return self.stage_dir("prepare") / "eval"

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer, with the chat template used for the data."""
        return self.stage_dir("prepare") / "tokenizer"

    @property
    def data_report_file(self) -> Path:
        """Counts of rows and tokens, what was truncated or dropped, and one row as the model sees it."""
        return self.stage_dir("prepare") / "data_report.json"

    @property
    def data_page_file(self) -> Path:
        """The same for people, as one page of HTML."""
        return self.stage_dir("prepare") / "data_report.html"

    # train
    @property
    def checkpoints_dir(self) -> Path:
        """Local checkpoints: `checkpoint-STEP`, or `writing-STEP` until complete. Only commits in the store count."""
        return self.run_dir / "checkpoints"

    @property
    def adapter_dir(self) -> Path:
        return self.stage_dir("train") / "adapter"

    @property
    def trainer_state_file(self) -> Path:
        return self.stage_dir("train") / "trainer_state.json"

    @property
    def metrics_file(self) -> Path:
        return self.stage_dir("train") / "metrics.json"

    @property
    def tensorboard_dir(self) -> Path:
        return self.stage_dir("train") / "tensorboard"

    # sample, merge, publish
    @property
    def samples_file(self) -> Path:
        return self.stage_dir("sample") / "samples.json"

    @property
    def merged_dir(self) -> Path:
        return self.stage_dir("merge") / "model"

    @property
    def merge_proof_file(self) -> Path:
        return self.stage_dir("merge") / "merge_proof.json"

    @property
    def merged_hashes_file(self) -> Path:
        """The SHA-256 of each file with merged weights, taken while it was written."""
        return self.stage_dir("merge") / "sha256.json"

    @property
    def repository_dir(self) -> Path:
        """The repository to publish, with hard links to the merged model. It is removed after publishing."""
        return self.run_dir / "repository"

    @property
    def exports_dir(self) -> Path:
        """The merged model in the formats that FT_EXPORT names."""
        return self.stage_dir("export") / "files"

    @property
    def exports_file(self) -> Path:
        """What each export is, and how far it is from the merged model."""
        return self.stage_dir("export") / "exports.json"

    @property
    def adapter_published_file(self) -> Path:
        return self.stage_dir("publish_adapter") / "published.json"

    @property
    def published_file(self) -> Path:
        """Where the model was published, and in which commit."""
        return self.stage_dir("publish") / "published.json"

    # between starts, and between supervisor and stages
    @property
    def lock_file(self) -> Path:
        """Locked by the one start that works in this folder. Its content names that start."""
        return self.run_dir / "lock"

    @property
    def starts_file(self) -> Path:
        """How many starts in a row stored nothing new."""
        return self.run_dir / "starts.json"

    @property
    def stop_file(self) -> Path:
        """If this file exists, a stop was requested. It contains the deadline, in seconds since the epoch."""
        return self.run_dir / "stop-request"

    @property
    def meeting_file(self) -> Path:
        """Where the ranks of one node meet; there only while they train."""
        return self.run_dir / "ranks"

    @property
    def inductor_dir(self) -> Path:
        """torch.compile's cache, unless TORCHINDUCTOR_CACHE_DIR names another. Its default is in a folder of everyone's."""
        return self.output_dir / "cache" / "inductor"

    @property
    def kernels_dir(self) -> Path:
        """Triton's cache, shared by all runs below `output_dir`, unless TRITON_CACHE_DIR names another folder."""
        return self.output_dir / "cache" / "triton"

    @property
    def turns_file(self) -> Path:
        """When each stage of this start began. Prestarted processes wait for their stage to appear here."""
        return self.run_dir / "turns.json"

    @property
    def card_file(self) -> Path:
        """This machine's GPU, and the rate of matrix products that preflight measured on it."""
        return self.run_dir / "card.json"

    @property
    def upload_timing_file(self) -> Path:
        """How long the last checkpoint upload took."""
        return self.run_dir / "upload-timing.json"

    def error_file(self, stage: str, rank: int) -> Path:
        """Why a process of a stage failed, as JSON, because torchrun does not pass on exit codes."""
        return self.run_dir / "errors" / f"{stage}-rank{rank}.json"

    def log_file(self, stage: str) -> Path:
        """Everything that a stage and its libraries printed, with secrets masked."""
        return self.run_dir / "logs" / f"{stage}.log"
