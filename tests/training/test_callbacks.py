"""The callbacks that guard the money: no training on a loss that is no number, a stop that all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from job.errors import InputError
from job.training.callbacks import HonourStopRequests, KeepDataOrder, RefuseNonsense


def state(step: int, of: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=of)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training(loss: float) -> None:
    with pytest.raises(InputError, match="at step 3") as caught:
        RefuseNonsense().on_log(None, state(3), TrainerControl(), {"loss": loss})
    assert caught.value.exit_code == 65
    RefuseNonsense().on_log(None, state(3), TrainerControl(), {"loss": 2.5})


def test_a_stop_request_saves_and_stops_but_a_finished_training_is_finished(make_run: Callable[..., Any]) -> None:
    run = make_run()
    stop, control = HonourStopRequests(run), TrainerControl()
    stop.on_step_end(SimpleNamespace(device="cpu"), state(3), control)
    assert not (stop.stopped or control.should_training_stop)
    run.paths.stop_file.parent.mkdir(parents=True)
    run.paths.stop_file.write_text("0", encoding="utf-8")
    stop.on_step_end(SimpleNamespace(device="cpu"), state(10), control)
    assert not stop.stopped  # behind the last step there is nothing left to stop
    stop.on_step_end(SimpleNamespace(device="cpu"), state(4), control)
    assert stop.stopped
    assert control.should_save
    assert control.should_training_stop


def test_a_resumed_epoch_starts_from_the_generator_that_it_began_with(tmp_path: Any) -> None:
    args = SimpleNamespace(output_dir=str(tmp_path))
    (tmp_path / "checkpoint-3").mkdir()
    first = KeepDataOrder(None)
    torch.manual_seed(5)
    first.on_epoch_begin(args, state(0), TrainerControl())
    order = torch.randperm(20)
    first.on_save(args, state(3), TrainerControl())
    torch.manual_seed(99)
    resumed = KeepDataOrder(tmp_path / "checkpoint-3")
    resumed.on_epoch_begin(args, state(3), TrainerControl())
    assert torch.equal(torch.randperm(20), order)
    resumed.on_epoch_begin(args, state(6), TrainerControl())  # the next epoch goes on from where the generator is
    assert not torch.equal(torch.randperm(20), order)
