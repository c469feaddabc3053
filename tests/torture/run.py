"""What all tortured runs share: the model, the servers, and processes that import the libraries once."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from job.storage import open_store
from tests import forkserver
from tests.conftest import LIGHTHOUSE, OFFLINE, forking, session_folder
from tests.fake_hub import FakeHub
from tests.torture.scenarios import SCENARIOS, Scenario

RUN_ID, SAVE_STEPS, MAX_STEPS = "tortured", 3, 16
_QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "TRANSFORMERS_VERBOSITY": "warning",
}  # fmt: skip


@dataclass
class World:
    """Everything outside the runs' own folders."""

    top: Path
    model: Path
    faults: Path  # the library that makes disks fail and clocks jump
    s3: str
    hub: FakeHub
    hf_home: Path | None = None

    def prepare(self, scenarios: list[Scenario]) -> None:
        """Put the sources where the scenarios look for them, and start what forks the stages' processes."""
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                       "AWS_ENDPOINT_URL": self.s3, "LD_PRELOAD": str(self.faults)}  # fmt: skip
        for rows in {scenario.rows for scenario in SCENARIOS}:
            lines = LIGHTHOUSE.read_text(encoding="utf-8").splitlines()
            text = "\n".join(lines[number % len(lines)] for number in range(rows)) + "\n"
            self.dataset(rows).write_text(text, encoding="utf-8")
        self.hub.add("models/base/tiny", self.model)
        self.hub.add("datasets/data/lighthouse", {"train.jsonl": self.dataset(40).read_bytes()})
        store = open_store("s3://bucket/sources")
        for file in self.model.iterdir():
            store.upload(file, f"model/{file.name}")
        store.upload(self.dataset(40), "data/rows.jsonl")
        online = [{**os.environ, **OFFLINE, **_QUIET, "HF_HOME": str(session_folder() / "hf-home")}]
        if any(scenario.sources == "hub" for scenario in scenarios):
            online.append({**os.environ, **self.hub_environment(), **_QUIET})
        offline = [environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} for environment in online]
        forkserver.start(session_folder(), [*online, *offline], os.getpid())

    def dataset(self, rows: int) -> Path:
        return self.top / f"rows-{rows}.jsonl"

    def hub_environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test_token",
            "HF_HOME": str(self.hf_home or self.top / "hf-home"),
        }  # fmt: skip

    def environment(self, scenario: Scenario, folder: Path) -> dict[str, str]:
        """The environment of every start of a run in `folder`."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FT_")},
            "FT_MODEL_NAME": str(self.model), "FT_DATASET_NAME": str(self.dataset(scenario.rows)), "FT_EVAL_SPLIT": "0.2",
            "FT_DEVICE": "cpu", "FT_LORA_R": "4", "FT_MAX_STEPS": str(MAX_STEPS), "FT_SAVE_STEPS": str(SAVE_STEPS),
            "FT_LOGGING_STEPS": "1", "FT_LEARNING_RATE": "1e-2", "FT_GRADIENT_ACCUMULATION_STEPS": "8",
            "FT_SAMPLE_MAX_NEW_TOKENS": "4", "FT_NEW_MODEL": "tortured", "FT_OUTPUT_DIR": str(folder / "results"),
            "FT_RUN_ID": RUN_ID, "FT_LOG_FORMAT": "json", "FT_MAX_IDLE_STARTS": "0", "FT_DATASET_SPLIT": "train[:40]",
            **OFFLINE, "HF_HOME": str(session_folder() / "hf-home"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent / "chaos"), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        if scenario.rows != 40:
            environment["FT_DATASET_SPLIT"] = "train"
        if scenario.sources == "s3":
            environment |= {
                "FT_MODEL_NAME": "s3://bucket/sources/model",
                "FT_DATASET_NAME": "s3://bucket/sources/data",
            }
        if scenario.sources == "hub":
            environment |= {
                "FT_MODEL_NAME": "base/tiny", "FT_DATASET_NAME": "data/lighthouse", "FT_DATASET_SPLIT": "train",
                "FT_PUBLISH_TO": f"hf://{repository_of(folder)}", **self.hub_environment(),
            }  # fmt: skip
        environment |= scenario.settings
        return forking(environment) if scenario.forks else environment


def repository_of(folder: Path) -> str:
    return f"me/{folder.name}"


def build_faults(top: Path) -> Path:
    """Compile the library that is preloaded into the job's processes."""
    library = top / "faults.so"
    source = Path(__file__).parent / "chaos" / "faults.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
