"""Where the time went adds up, and hidden waiting is not counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.report.goodput import speed_text, time_text
from job.training.goodput import Goodput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def run_two_steps(busy: bool | None) -> dict[str, Any]:
    """5 s of start, steps of 4 s and 2 s, 1 s of waiting before each, 3 s of saving, 1 s of nothing at the end. A GPU that is `busy`
    has 10 s of the last step before it when the saving begins."""
    clock, tokens = Clock(), [0.0]
    goodput = Goodput(lambda: tokens[0], clock)
    arguments = SimpleNamespace(device=torch.device("cpu"))
    clock.now += 5
    goodput.on_train_begin(arguments, None, None, model=torch.nn.Linear(10, 10, bias=False))  # type: ignore[arg-type]
    for seconds in (4, 2):
        if busy is not None:
            goodput._end_of_work = SimpleNamespace(query=lambda: not busy, synchronize=lambda: clock.wait(10 * busy))
        clock.now += 1
        goodput.on_step_begin(arguments, None, None)  # type: ignore[arg-type]
        clock.now += seconds
        tokens[0] += 100
        goodput.on_step_end(arguments, None, None)  # type: ignore[arg-type]
    with goodput.spending("save"):
        clock.now += 3
    clock.now += 1
    return goodput.report(matmul_flops=120_000.0)


def test_every_second_is_counted_once() -> None:
    found = run_two_steps(busy=None)
    assert found["seconds"] == {"start": 5, "data": 2, "first_step": 4, "compute": 2, "save": 3, "idle": 1}
    assert found["tokens_per_second"] == 50  # the first step is no measure
    assert found["useful_flops_per_second"] == 50 * 600
    assert found["part_of_matmul_rate"] == pytest.approx(0.25)
    assert speed_text(found) == (
        "50 tokens/s a process, 3e-08 useful TFLOP/s (25% of what large products reach on this card)"
    )
    assert time_text(found) == "start 5 s, first step 4 s, saving 3 s, waiting for data 2 s, training 2 s, other 1 s"


def test_rows_that_come_while_the_gpu_works_cost_nothing() -> None:
    found = run_two_steps(busy=True)["seconds"]
    assert "data" not in found
    assert found["first_step"] == 5


def test_work_that_is_left_to_the_gpu_is_training_and_not_saving() -> None:
    found = run_two_steps(busy=True)["seconds"]
    assert (found["compute"], found["save"]) == (3 + 10, 3)


def test_a_training_without_a_second_step_has_no_speed() -> None:
    assert speed_text({"seconds": {"start": 1.0}}) is None
    assert time_text({"seconds": {"start": 0.1}}) == "under a second"
