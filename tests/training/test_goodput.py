"""Where the time went adds up, and hidden waiting is not counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.report.goodput import first_step_text, speed_text, time_text
from job.training import goodput
from job.training.goodput import Goodput


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def run_two_steps() -> dict[str, Any]:
    """5 s of start, steps of 4 s and 2 s, 1 s of waiting before each, 3 s of saving, 1 s of nothing at the end."""
    clock, tokens = Clock(), [0.0]
    goodput = Goodput(lambda: tokens[0], clock)
    arguments = SimpleNamespace(device=torch.device("cpu"))
    clock.now += 5
    goodput.on_train_begin(arguments, None, None, model=torch.nn.Linear(10, 10, bias=False))  # type: ignore[arg-type]
    for seconds in (4, 2):
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
    found = run_two_steps()
    assert found["seconds"] == {"start": 5, "data": 2, "first_step": 4, "compute": 2, "save": 3, "idle": 1}
    # the first step does not count, but the wait before the second does
    assert found["tokens_per_second"] == pytest.approx(100 / 3, abs=0.1)
    assert found["useful_flops_per_second"] == 100 / 3 * 600
    assert found["part_of_matmul_rate"] == pytest.approx(1 / 6, abs=1e-4)
    assert speed_text(found) == (
        "33 tokens/s per process, 2e-08 useful TFLOP/s (17% of what large matrix products reach on this GPU)"
    )
    assert found["first_step_after_seconds"] == 5 + 1 + 4
    assert first_step_text(found) == "done 10 s after the job started"
    assert time_text(found) == "start 5 s, first step 4 s, saving 3 s, waiting for data 2 s, training 2 s, other 1 s"


class Gpu:
    """Queues work, and reports when it reached a mark, as CUDA events do."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.free = clock, 0.0
        monkeypatch.setattr(goodput, "_mark", self.mark)

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.clock.now) + seconds

    def mark(self) -> Any:
        moment = max(self.free, self.clock.now)

        def synchronize() -> None:
            self.clock.now = max(self.clock.now, moment)

        return SimpleNamespace(
            moment=moment, synchronize=synchronize, elapsed_time=lambda later: 1000 * (later.moment - moment)
        )


def run_on_gpu(monkeypatch: pytest.MonkeyPatch, rows: float, *, logs: bool) -> dict[str, Any]:
    """Five steps of 10 s on the GPU, each launched in 1 s and after `rows` s of waiting for its rows."""
    clock, tokens = Clock(), [0.0]
    gpu, found = Gpu(clock, monkeypatch), Goodput(lambda: tokens[0], clock)
    arguments: Any = SimpleNamespace(device=torch.device("cuda"))
    nothing: Any = None
    found.on_train_begin(arguments, nothing, nothing, model=torch.nn.Linear(10, 10, bias=False))
    for _ in range(5):
        clock.now += rows
        found.on_step_begin(arguments, nothing, nothing)
        clock.now += 1
        gpu.work(10)
        tokens[0] += 100
        found.on_step_end(arguments, nothing, nothing)
        if logs:
            gpu.mark().synchronize()  # to read the loss
            found.on_log(arguments, nothing, nothing)
            assert not found._pauses, "no marks pile up"
    with found.spending("save"):
        clock.now += 3
    assert sum(found._spent.values()) == pytest.approx(clock.now - 100)
    return found.report(None)


def test_rows_that_arrive_while_the_gpu_works_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_on_gpu(monkeypatch, rows=2, logs=False)
    # the first step is awaited, so the second waits for its rows
    assert found["seconds"] == {"start": 0, "data": 4, "first_step": 11, "compute": 41, "save": 3, "idle": 0}
    assert found["tokens_per_second"] == pytest.approx(400 / 43, abs=0.1)


def test_a_gpu_that_waits_for_rows_is_distinguished_from_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_on_gpu(monkeypatch, rows=12, logs=False)["seconds"]
    # from the third step on, waiting for rows and launching take 12 s and 1 s, and the GPU works for 10 s of them
    assert (found["data"], found["compute"]) == (12 + 12 + 3 * 2, 4 * 10 + 4)


def test_reading_the_loss_counts_as_training_and_the_next_rows_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_on_gpu(monkeypatch, rows=2, logs=True)["seconds"]
    assert (found["data"], found["first_step"], found["compute"], found["save"]) == (5 * 2, 11, 4 * 11, 3)


def test_a_training_without_a_second_step_has_no_speed() -> None:
    assert speed_text({"seconds": {"start": 1.0}}) is None
    assert time_text({"seconds": {"start": 0.1}}) == "under a second"
    assert first_step_text({"seconds": {"start": 1.0}}) is None
