"""Faults of resuming that other projects' users reported, each as a test of this one."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import NodeError
from job.model import device as device_module
from tests.conftest import Job, contents, finished
from tests.supervision.test_interruptions import resumed_step

ADAPTER = "adapter/adapter_model.safetensors"
STEPS_OF_AN_EPOCH = 10  # 48 rows, a fifth held out, four a step


@pytest.fixture
def epochs(job: Job) -> Job:
    del job.environment["FT_MAX_STEPS"]
    job.environment |= {
        "FT_NUM_TRAIN_EPOCHS": "3", "FT_STAGES": "train", "FT_LOG_LEVEL": "debug", "FT_GROUP_BY_LENGTH": "false",
        "FT_EVAL_SPLIT": "0.2",
    }  # fmt: skip
    return job


def kill_after_commit(process: subprocess.Popen[str], step: int) -> None:
    """SIGKILL the job as soon as its checkpoint of `step` counts."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("committed") and event["step"] >= step:
            assert event["step"] == step, "the machine was too quick for the test"
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
    pytest.fail(f"no checkpoint of step {step}: {process.communicate()[1]}")


def trained(job: Job) -> tuple[str, str, list[Any]]:
    """The adapter, the order of rows, and the losses."""
    folder = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "train"
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    order = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["row_order_sha256"]
    return contents(folder)[ADAPTER], order, [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(STEPS_OF_AN_EPOCH + 4, id="in epoch 2: its order is not epoch 1's again (ms-swift#10050)"),
        pytest.param(STEPS_OF_AN_EPOCH, id="exactly at the border: the next epoch is not skipped (verl#7401)"),
    ],
)
def test_a_kill_changes_neither_the_order_of_an_epoch_nor_the_number_of_epochs(
    epochs: Job, tmp_path: Path, step: int
) -> None:
    epochs.environment["FT_SAVE_STEPS"] = str(step)
    straight = Job({**epochs.environment, "FT_OUTPUT_DIR": str(tmp_path / "straight")})
    assert straight.run().code == 0
    kill_after_commit(epochs.start(), step)
    again = epochs.run()
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) == step
    _, _, losses = trained(epochs)
    assert losses[-1][0] == 3 * STEPS_OF_AN_EPOCH
    assert trained(epochs) == trained(straight)


# -- another card ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("started", "card", "computes"), [("float16", (8, 0), torch.float16), ("", (7, 5), torch.float16),
                                                           ("bfloat16", (9, 0), torch.bfloat16), ("", (8, 0), torch.bfloat16)])  # fmt: skip
def test_a_run_keeps_the_type_that_it_started_with_on_another_card(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, started: str, card: tuple[int, int], computes: torch.dtype
) -> None:
    """A run that began in float16 ended with 70 on a bfloat16 card: its checkpoint has a loss scale, the trainer none."""
    settings = make_run(DEVICE="cuda").settings
    monkeypatch.setenv(device_module.STARTED_WITH, started)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    assert device_module.compute_dtype(settings, torch.device("cuda", 0)) == computes


def test_a_bfloat16_run_on_a_card_without_it_is_69_and_says_which_cards_do(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_run(DEVICE="cuda").settings
    monkeypatch.setenv(device_module.STARTED_WITH, "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(NodeError, match="since its first start, which the Tesla T4 does not support"):
        device_module.compute_dtype(settings, torch.device("cuda", 0))


def test_what_the_first_start_decided_is_recorded_once_and_told_to_every_stage(make_run: Any) -> None:
    from job.checkpoints.lease import Lease
    from job.supervision.ledger import Ledger

    run = make_run()
    ledger = Ledger(run)
    assert ledger.decided("compute_dtype") is None
    ledger.begin(Lease.take(run, lambda text: None, lambda: False))
    ledger.note({"compute_dtype": "float16"})
    ledger.note({"compute_dtype": "bfloat16"})
    assert Ledger(run).decided("compute_dtype") == "float16"


def test_ctrl_c_says_at_once_what_happens_and_is_no_error(job: Job) -> None:
    job.environment |= {"FT_STAGES": "train", "FT_MAX_STEPS": "100000", "FT_STOP_GRACE_SECONDS": "20"}
    process = job.start()
    assert process.stdout is not None
    for line in process.stdout:
        if {"event": "progress", "stage": "train"}.items() <= json.loads(line).items():
            break
    process.send_signal(signal.SIGINT)
    stopped = finished(process, *process.communicate(timeout=60))
    assert stopped.code == 75
    told = next(event["message"] for event in stopped.events if event.get("message", "").startswith("Stopping"))
    assert told == "Stopping: finishing this step and storing a checkpoint, at most 20 s. Ask again to quit now."
    assert (stopped.error["event"], stopped.error["level"]) == ("stopped", "info")
