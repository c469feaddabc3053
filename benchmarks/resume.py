"""Is a killed and resumed training still the same training, and how long does resuming take?

    FT_MODEL_NAME=… FT_DATASET_NAME=… python benchmarks/resume.py --kill-at 60 150

Trains twice without interruption, which shows how much two runs on this device differ anyway, and once killed by
SIGKILL after the given steps. Prints the largest difference in loss between the runs, and the seconds from the start of
a process to its first step. Settings come from the environment, and FT_OUTPUT_DIR is a new folder for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def start(folder: Path, kill_at: int | None) -> dict[str, Any]:
    """Start the job, and let it finish or kill it after step `kill_at`."""
    environment = {
        "FT_LOGGING_STEPS": "1", "FT_SAVE_STEPS": "20", **os.environ, "FT_OUTPUT_DIR": str(folder), "FT_RUN_ID": "resume", "FT_LOG_FORMAT": "json",
        "FT_STAGES": "preflight,download,prepare,train", "FT_LOG_LEVEL": "debug",
    }  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py")], env=environment, stdout=subprocess.PIPE, text=True
    )
    life: dict[str, Any] = {"first_step": None, "resumed_from": 0, "train_began": None}
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("event") == "stage_started" and event.get("stage") == "train":
            life["train_began"] = time.monotonic() - began
        if str(event.get("message", "")).startswith("Resuming from"):
            life["resumed_from"] = event["step"]
        if event.get("event") == "progress" and event.get("stage") == "train":
            life["first_step"] = life["first_step"] or time.monotonic() - began
            life["reached"] = event["done"]
            if kill_at is not None and event["done"] >= kill_at:
                process.kill()
    life["exit_code"] = process.wait()
    return life


def losses(folder: Path) -> dict[int, float]:
    state = json.loads((folder / "runs" / "resume" / "train" / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    if one.keys() != other.keys():
        raise SystemExit("the runs did not log the same steps")
    return max(abs(one[step] - other[step]) for step in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-at", type=int, nargs="+", required=True)
    kills = parser.parse_args().kill_at
    with tempfile.TemporaryDirectory() as scratch:
        curves = {}
        for name, ends in {"first": [None], "second": [None], "killed": [*kills, None]}.items():
            for kill_at in ends:
                life = start(Path(scratch) / name, kill_at)
                print(json.dumps({"run": name, **life}), flush=True)
                if life["exit_code"] != (0 if kill_at is None else -9):
                    raise SystemExit(f"exit code {life['exit_code']}")
            curves[name] = losses(Path(scratch) / name)
    print(
        json.dumps(
            {
                "steps": len(curves["first"]),
                "two uninterrupted runs differ by at most": largest_difference(curves["first"], curves["second"]),
                "the killed run differs by at most": min(
                    largest_difference(curves["killed"], curves[name]) for name in ("first", "second")
                ),
                "last loss": {name: curve[max(curve)] for name, curve in curves.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
