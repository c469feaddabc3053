"""The callbacks that guard the money: none is spent on a NaN loss, and all ranks agree on a stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from job.errors import InputError
from job.run import write_json
from job.training.callbacks import DecideSaves, RefuseNonsense
from job.training.pace import SavePace


def state(step: int, of: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=of)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_a_number_ends_the_training(loss: float) -> None:
    with pytest.raises(InputError, match="at step 3") as caught:
        RefuseNonsense().on_log(None, state(3), TrainerControl(), {"loss": loss})
    assert caught.value.exit_code == 65
    RefuseNonsense().on_log(None, state(3), TrainerControl(), {"loss": 2.5})


def deciding(run: Any, pace: SavePace) -> DecideSaves:
    return DecideSaves(pace, run.stop_deadline, paced=run.settings.save_steps == "auto")


def stop_before(run: Any, deadline: float) -> None:
    run.paths.stop_file.parent.mkdir(parents=True, exist_ok=True)
    run.paths.stop_file.write_text(str(deadline), encoding="utf-8")


def test_a_stop_request_saves_and_stops_but_a_finished_training_is_finished(make_run: Callable[..., Any]) -> None:
    run = make_run()
    stop, control = deciding(run, SavePace(run.paths.upload_timing_file)), TrainerControl()
    stop.on_step_end(SimpleNamespace(device="cpu"), state(3), control)
    assert not (stop.stopped or control.should_training_stop)
    stop_before(run, time.time() + 60)
    stop.on_step_end(SimpleNamespace(device="cpu"), state(10), control)
    assert not stop.stopped  # after the last step there is nothing left to stop
    stop.on_step_end(SimpleNamespace(device="cpu"), state(4), control)
    assert stop.stopped
    assert control.should_save
    assert control.should_training_stop


def test_a_save_that_cannot_be_stored_before_the_deadline_is_not_started(make_run: Callable[..., Any]) -> None:
    run = make_run()
    pace = SavePace(run.paths.upload_timing_file)
    stop, control = deciding(run, pace), TrainerControl(should_save=True)
    pace.saved(4.0)
    write_json(run.paths.upload_timing_file, {"seconds": 20.0})
    stop_before(run, time.time() + 30)  # a save and its upload take 24 s, and half as much again makes 36 s
    stop.on_step_end(SimpleNamespace(device="cpu"), state(4), control)
    assert stop.stopped
    assert control.should_training_stop
    assert not control.should_save
    stop_before(run, time.time() + 40)
    stop.on_step_end(SimpleNamespace(device="cpu"), state(4), control)
    assert control.should_save


def test_the_pace_of_saves_follows_what_saves_and_uploads_take(make_run: Callable[..., Any]) -> None:
    run, seconds = make_run(), [0.0]
    pace = SavePace(run.paths.upload_timing_file, clock=lambda: seconds[0])
    assert pace.interval_seconds() == 30  # nothing is known yet
    pace.saved(0.01)
    assert pace.interval_seconds() == 30  # saving more often gains nothing
    pace.saved(2.0)
    assert pace.interval_seconds() == 200  # a hundredth of the time
    pace.saved(60.0)
    assert pace.interval_seconds() == 600  # never lose more than ten minutes
    write_json(run.paths.upload_timing_file, {"seconds": 1000})
    assert pace.interval_seconds() == 1500  # unless the store cannot keep up
    seconds[0] = 1499
    assert not pace.due()
    seconds[0] = 1501
    assert pace.due()
    pace.saved(60.0)
    assert not pace.due()


@pytest.mark.parametrize("save_steps", ["auto", "3"])
def test_auto_saves_when_the_pace_says_so_and_a_number_leaves_it_to_the_steps(
    make_run: Callable[..., Any], save_steps: str
) -> None:
    run, seconds = make_run(SAVE_STEPS=save_steps), [0.0]
    decide, control = deciding(run, SavePace(run.paths.upload_timing_file, clock=lambda: seconds[0])), TrainerControl()
    seconds[0] = 31
    decide.on_step_end(SimpleNamespace(device="cpu"), state(4), control)
    assert control.should_save == (save_steps == "auto")
    assert not control.should_training_stop
