"""Where a training's time went, and how much of the card's arithmetic it used while computing."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.training.utilization import useful_flops_per_token


class Goodput(TrainerCallback):
    """Counts what this process spent the seconds of this start on. `tokens()` returns the tokens trained so far.

    `start`       everything before the first step: model and data. Imports only count if the process was not prestarted
    `first_step`  the first step, including whatever it compiles or tunes
    `compute`     the other steps
    `data`        time between steps in which the GPU had nothing to do, because rows or requests came too late
    `idle`        the rest
    """

    def __init__(self, tokens: Callable[[], float], clock: Callable[[], float] = time.time) -> None:
        self._clock, self._tokens = clock, tokens
        self._began = float(os.environ.get("JOB_STAGE_BEGAN") or clock())
        self._job_began = float(os.environ.get("JOB_BEGAN") or self._began)
        self._first_step_after: float | None = None
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._flops_per_token = self._since = 0.0
        self._waited_for_first = self._tokens_of_first = 0.0
        # A GPU may still be computing steps that this process has already left. These events mark when it finishes the
        # last step, and from when to when it had nothing to do.
        self._end_of_work: Any = None
        self._pauses: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def spending(self, name: str) -> Iterator[None]:
        self._await_work()
        began = self._clock()
        try:
            yield
        finally:
            self._spent[name] += self._clock() - began
            self._since = self._clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flops_per_token = useful_flops_per_token(kwargs["model"])
        self._spent["start"] = self._clock() - self._began
        self._since = self._clock()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._end_of_work is None:
            self._spent["data"] += self._clock() - self._since
            self._since = self._clock()
        else:
            self._pauses.append((self._end_of_work, _mark()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            self._end_of_work = _mark()
        if "first_step" not in self._spent:
            self._settle("first_step")
            self._first_step_after = self._since - self._job_began
            self._waited_for_first, self._tokens_of_first = self._spent["data"], self._tokens()
        elif self._end_of_work is None:
            self._settle("compute")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._await_work()  # logging the loss has waited for the GPU already, and events must not pile up

    def _await_work(self) -> None:
        """Count the GPU's remaining work on the last step as training, not as what comes after it."""
        if self._end_of_work is not None:
            self._settle("compute")

    def _settle(self, name: str) -> None:
        """Count the time since the last count as `name`, except for the GPU's pauses, which are `data`."""
        if self._end_of_work is not None:
            self._end_of_work.synchronize()
        paused = sum(begin.elapsed_time(end) for begin, end in self._pauses) / 1000
        now = self._clock()
        self._spent["data"] += paused
        self._spent[name] += now - self._since - paused
        self._since, self._end_of_work, self._pauses = now, None, []

    def report(self, matmul_flops: float | None) -> dict[str, Any]:
        """The figures for people and for `metrics.json`.

        Rates are those of all steps after the first, including the time between steps but not saves and evaluations.
        """
        self._await_work()
        total = self._clock() - self._began
        seconds = {name: round(value, 2) for name, value in self._spent.items()}
        seconds["idle"] = round(max(0.0, total - sum(self._spent.values())), 2)
        figures: dict[str, Any] = {"seconds": seconds}
        if self._first_step_after is not None:
            figures["first_step_after_seconds"] = round(self._first_step_after, 2)
        trained = self._tokens() - self._tokens_of_first
        if trained and self._spent["compute"]:
            rate = trained / (self._spent["compute"] + self._spent["data"] - self._waited_for_first)
            figures |= {
                "tokens_per_second": round(rate, 1),
                "useful_flops_per_second": round(rate * self._flops_per_token),
            }
            if matmul_flops:
                figures["part_of_matmul_rate"] = round(rate * self._flops_per_token / matmul_flops, 4)
        return figures


def _mark() -> Any:
    """A CUDA event that marks this moment in the GPU's work."""
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record()
    return mark
