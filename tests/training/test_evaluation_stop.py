"""A stop during an evaluation: the training is saved first, and the evaluation is made up for later."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIGHTHOUSE, Job, contents, finished
from tests.supervision.test_interruptions import resumed_step

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def evaluating(job: Job, tmp_path: Path) -> Job:
    """Evaluations that take longer than the time that a stop leaves: 200 rows, one at a time."""
    rows = LIGHTHOUSE.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows[number % len(rows)] for number in range(400)) + "\n", encoding="utf-8")
    job.environment |= {
        "FT_DATASET_NAME": str(file), "FT_DATASET_SPLIT": "train", "FT_EVAL_SPLIT": "0.5", "FT_EVAL_STEPS": "4", "FT_MAX_STEPS": "8",
        "FT_SAVE_STEPS": "1000", "FT_PER_DEVICE_EVAL_BATCH_SIZE": "1", "FT_STAGES": "train", "FT_STOP_GRACE_SECONDS": "20",
    }  # fmt: skip
    return job


def result_of(job: Job) -> tuple[str, list[dict[str, Any]]]:
    """The hash of the adapter, and the loss curve without times."""
    folder = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "train"
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    timed = ("runtime", "per_second", "total_flos")
    curve = [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in history
    ]
    return contents(folder)[ADAPTER], curve


def read_until_evaluating(process: subprocess.Popen[str], step: int) -> None:
    """Follow the log until an evaluation after `step` is under way."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("event") == "progress" and event.get("done") == step and event.get("evaluated"):
            return
    pytest.fail(f"no evaluation was seen: {process.communicate()[1]}")


@pytest.mark.parametrize("patience", [None, "1"], ids=["plain", "early stopping"])
def test_a_stop_in_an_evaluation_longer_than_the_grace_time_loses_no_step(
    evaluating: Job, tmp_path: Path, patience: str | None
) -> None:
    """As in goodfire-ai/spd#677, where none of six runs survived it."""
    if patience is not None:
        evaluating.environment["FT_EARLY_STOPPING_PATIENCE"] = patience
    process = evaluating.start()
    read_until_evaluating(process, 4)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    stopped = finished(process, *process.communicate(timeout=60))
    assert stopped.code == 75, stopped.stderr
    assert time.monotonic() - asked < 15
    again = evaluating.run()
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) == 4
    straight = Job({**evaluating.environment, "FT_OUTPUT_DIR": str(tmp_path / "straight")})
    assert straight.run().code == 0
    assert result_of(evaluating) == result_of(straight)


def test_a_stop_in_the_last_evaluation_resumes_with_that_evaluation(evaluating: Job, tmp_path: Path) -> None:
    evaluating.environment |= {"FT_EVAL_STEPS": "1000", "FT_MAX_STEPS": "3"}
    process = evaluating.start()
    read_until_evaluating(process, 3)
    process.send_signal(signal.SIGTERM)
    stopped = finished(process, *process.communicate(timeout=60))
    assert stopped.code == 75, stopped.stderr
    again = evaluating.run()
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) == 3
    straight = Job({**evaluating.environment, "FT_OUTPUT_DIR": str(tmp_path / "straight")})
    assert straight.run().code == 0
    assert result_of(evaluating) == result_of(straight)


def test_a_checkpoint_is_written_before_the_evaluation_of_its_step(evaluating: Job) -> None:
    evaluating.environment["FT_SAVE_STEPS"] = "4"
    result = evaluating.run(FT_LOG_LEVEL="debug")
    assert result.code == 0, result.stderr
    stored = next(index for index, event in enumerate(result.events) if event.get("committed") and event["step"] == 4)
    evaluated = next(
        index for index, event in enumerate(result.events) if "Step 4: evaluation loss" in event.get("message", "")
    )
    assert stored < evaluated
