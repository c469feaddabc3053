"""Fixtures: a tiny real Llama with its own tokenizer, a fake Hub that speaks the real protocol, and runs of the job."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent
LIGHTHOUSE = ROOT / "examples" / "lighthouse.jsonl"
SHARED = ROOT.parent / "shared" / "data"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
SECRETS = ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")

sys.path.insert(0, str(ROOT))
from tests import forkserver  # noqa: E402

# Where all tests must run (.ci/run), they try the same examples each time; elsewhere new ones.
hypothesis.settings.register_profile("same", derandomize=True)
if os.environ.get("ALL_TESTS_MUST_RUN"):
    hypothesis.settings.load_profile("same")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, which jobs would inherit and respect
os.environ["FT_ENV_FILE"] = os.devnull  # a developer's .env must not affect the tests
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which bitsandbytes does
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' models are tiny, and several jobs share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/real needs root."""
    for item in items:
        if Path(__file__).parent / "real" in item.path.parents:
            item.add_marker("real")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's settings, secrets and caches out of the tests."""
    for name in list(os.environ):
        if (
            (name.upper().startswith(("FT_", "SLURM_")) and name != "FT_ENV_FILE")
            or name in SECRETS
            or name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL", "HF_HUB_OFFLINE")
        ):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def make_tiny_model(folder: Path) -> Path:
    """A Llama with 2 layers and random weights, and a BPE tokenizer trained on the sample dataset."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(LIGHTHOUSE)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def unavailable(reason: str) -> NoReturn:
    """End a test that this machine cannot run. It is skipped, or fails where every test must run, as in CI."""
    if os.environ.get("ALL_TESTS_MUST_RUN"):
        pytest.fail(reason)
    pytest.skip(reason)


@dataclass
class Result:
    """A finished process of the job: its exit code, its JSON log lines, and the JSON error it ended with."""

    code: int
    stdout: str
    stderr: str
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.stderr.strip().splitlines()[-1]))

    @property
    def ended(self) -> dict[str, str]:
        """Stage name → result, as the closing event lists them."""
        closing = next(event for event in reversed(self.events) if event.get("event") == "run_ended")
        return {item["stage"]: item["result"] for item in closing["stages"]}


@dataclass
class Job:
    """The job as its users see it: environment variables in, exit code and log lines out.

    Its stages are forked from a server that has imported the libraries (tests/forkserver), unless a test is about the
    processes themselves.
    """

    environment: dict[str, str]
    forks: bool = True

    def start(self, command: str = "run", **settings: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment, **settings}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py"), command],
            env=forking(environment) if self.forks else environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.environment.get("JOB_TEST_CWD", ROOT),
        )

    def run(self, command: str = "run", **settings: str) -> Result:
        process = self.start(command, **settings)
        stdout, stderr = process.communicate(timeout=600)
        return finished(process, stdout, stderr)


def session_folder() -> Path:
    """A folder for what all workers of this test session share."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return Path(tempfile.gettempdir()) / f"finetune-job-tests-{session}"


def forking(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which the job's stages are forked from a server instead of started."""
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "TRANSFORMERS_VERBOSITY": "warning",
    }  # fmt: skip
    online = {**os.environ, **OFFLINE, **quiet, "HF_HOME": str(session_folder() / "hf-home")}
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    servers = [online, online | {"HF_DATASETS_OFFLINE": "1"}]
    if environment.get("HF_ENDPOINT") == f"http://127.0.0.1:{hub_port()}" and environment.get("HF_HUB_OFFLINE") == "0":
        with_hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": environment["HF_ENDPOINT"], "HF_HUB_DISABLE_XET": "1"}
        servers.append(online | with_hub)
    forkserver.start(session_folder(), servers, owner)
    paths = filter(None, [str(forkserver.SITE), environment.get("PYTHONPATH")])
    return environment | {forkserver.DIRECTORY: str(session_folder()), "PYTHONPATH": os.pathsep.join(paths)}


def finished(process: subprocess.Popen[str], stdout: str, stderr: str) -> Result:
    events = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    return Result(process.returncode, stdout, stderr, events)


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Job:
    """A complete run that trains for seconds: the tiny model on the sample dataset, on the CPU."""
    return Job(
        {
            "FT_MODEL_NAME": str(tiny_model),
            "FT_DATASET_NAME": str(LIGHTHOUSE),
            "FT_DATASET_SPLIT": "train[:48]",
            "FT_EVAL_SPLIT": "0.2",
            "FT_DEVICE": "cpu",
            "FT_LORA_R": "4",
            "FT_MAX_STEPS": "6",
            "FT_SAVE_STEPS": "2",
            "FT_LOGGING_STEPS": "1",
            "FT_LEARNING_RATE": "1e-2",
            "FT_SAMPLE_MAX_NEW_TOKENS": "8",
            "FT_NEW_MODEL": "tiny-lighthouse",
            "FT_OUTPUT_DIR": str(tmp_path / "results"),
            "FT_LOG_FORMAT": "json",
            "FT_RUN_ID": "test-run",
            **OFFLINE,
            "HF_HOME": str(session_folder() / "hf-home"),
        }
    )


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def contents(folder: Path) -> dict[str, str]:
    """The path of every file below `folder`, and the hash of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def published(job: Job) -> Path:
    return Path(job.environment["FT_OUTPUT_DIR"]) / "published" / "tiny-lighthouse"


def read_until(process: subprocess.Popen[str], **wanted: object) -> None:
    """Follow the log until a line carries all of `wanted`."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if all(event.get(name) == value for name, value in wanted.items()):
            return
    pytest.fail(f"the job ended without {wanted}: {process.communicate()[1]}")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Job:
    """A complete run that nothing interrupted, and what it published."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = Job(
        {
            "FT_MODEL_NAME": str(tiny_model), "FT_DATASET_NAME": str(LIGHTHOUSE), "FT_DATASET_SPLIT": "train[:48]", "FT_EVAL_SPLIT": "0.2",
            "FT_DEVICE": "cpu", "FT_LORA_R": "4", "FT_MAX_STEPS": "6", "FT_SAVE_STEPS": "2", "FT_LOGGING_STEPS": "1", "FT_LEARNING_RATE": "1e-2",
            "FT_SAMPLE_MAX_NEW_TOKENS": "8", "FT_NEW_MODEL": "tiny-lighthouse", "FT_OUTPUT_DIR": str(folder / "results"), "FT_LOG_FORMAT": "json",
            "FT_RUN_ID": "test-run", **OFFLINE, "HF_HOME": str(session_folder() / "hf-home"),
        }
    )  # fmt: skip
    result = job.run()
    assert result.code == 0, result.stderr
    assert set(result.ended.values()) == {"done"}
    return job


@pytest.fixture
def make_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A Run in this process, to test one stage or package. Keyword arguments are settings without their prefix."""

    def make(**settings: str) -> Any:
        from job.environment import load_settings
        from job.run import Run

        defaults = {
            "MODEL_NAME": str(tiny_model),
            "DATASET_NAME": str(LIGHTHOUSE),
            "DEVICE": "cpu",
            "OUTPUT_DIR": str(tmp_path / "results"),
            "RUN_ID": "here",
        }
        for name, value in {**defaults, **settings}.items():
            monkeypatch.setenv(f"FT_{name}", value)
        return Run.of(load_settings())

    return make


@pytest.fixture
def make_run_with_model(make_run: Callable[..., Any], tiny_model: Path) -> Callable[..., Any]:
    """Like `make_run`, with the tiny model where the download stage would have put it."""

    def make(**settings: str) -> Any:
        run = make_run(**settings)
        run.paths.stage_dir("download").mkdir(parents=True)
        run.paths.model_dir.symlink_to(tiny_model)
        return run

    return make


def compute_of(run: Any) -> Any:
    """What the stages of a run with a downloaded model compute on."""
    from job.model.compute import Compute
    from job.run import read_json

    return Compute.of(run.settings, local_rank=0, config=read_json(run.paths.model_dir / "config.json"))


def load_model(run: Any, *, quantized: bool, attention: str | None = None) -> Any:
    """The base model of a run, as its stages load it."""
    from job.model.loading import load_base

    return load_base(run.paths.model_dir, run.settings, compute_of(run), quantized=quantized, attention=attention)


@pytest.fixture
def shared_data() -> Path:
    """Real data that only this project's developers have. A user's clone skips these tests."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server did not come up in a minute")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_s3(tmp_path_factory.mktemp("ministack")) as url:
        yield url


@contextmanager
def serve_s3(folder: Path) -> Iterator[str]:
    """The URL of an S3 server with an empty bucket `bucket`."""
    port = free_port()
    environment = {**os.environ, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-m", "ministack"],
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, process)
        url = f"http://127.0.0.1:{port}"
        import boto3

        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test"
        )
        client.create_bucket(Bucket="bucket")
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }.items():
        monkeypatch.setenv(name, value)


@functools.cache
def hub_port() -> int:
    """The port of this worker's Hubs, one after another: libraries that were imported for its address serve them all."""
    return free_port()


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hub on this machine."""
    from tests.fake_hub import FakeHub

    with FakeHub(hub_port()) as server:
        yield server
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import close_session

        close_session()  # a kept connection would reach this Hub after its end, instead of the next one
