"""Callbacks that tie trl's trainer to the job: progress, checkpoints for the syncer, stop requests, a NaN guard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.errors import InputError
from job.report.events import emit, message, progress
from job.training.pace import SavePace
from job.training.ranks import meeting_device
from job.training.utilization import peak_flops, useful_flops_per_token


class ReportProgress(TrainerCallback):
    """Reports steps, loss and throughput to the supervisor: every logged step, and about every second in between."""

    def __init__(self) -> None:
        self._figures: dict[str, Any] = {}
        self._evaluation: dict[str, float] = {}
        self._last_event = 0.0
        self._evaluated = 0
        self._flops_per_token = 0.0
        self._peak: float | None = None
        self._tokens, self._since = 0.0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.monotonic()
        self._flops_per_token, self._peak = useful_flops_per_token(kwargs["model"]), peak_flops(args.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._evaluation = {"eval_loss": float(logs["eval_loss"])}
            message(f"Step {state.global_step}: evaluation loss {logs['eval_loss']:.4f} nats/token.")
        if "loss" in logs:
            self._figures = {"loss": float(logs["loss"]), "learning_rate": float(logs["learning_rate"])}
            if "grad_norm" in logs:
                self._figures["grad_norm"] = float(logs["grad_norm"])
            tokens, moment = float(logs.get("num_tokens", 0)), time.monotonic()
            if tokens:
                self._figures["tokens"] = tokens
            if tokens > self._tokens > 0:
                rate = self._figures["tokens_per_second"] = (tokens - self._tokens) / (moment - self._since)
                if self._peak is not None:
                    self._figures["mfu"] = rate * self._flops_per_token / (self._peak * args.world_size)
            self._tokens, self._since = tokens, moment
            self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report_at_times(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_local_process_zero:
            self._report(state)  # the last step too, whenever the one before was reported

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        self._report_at_times(state)

    def _report_at_times(self, state: TrainerState) -> None:
        """Report from one process per machine, which shows the supervisor there that training makes progress."""
        if state.is_local_process_zero and time.monotonic() - self._last_event > 1:
            self._report(state)

    def _report(self, state: TrainerState) -> None:
        self._last_event = time.monotonic()
        figures = self._figures | self._evaluation | ({"evaluated": self._evaluated} if self._evaluated else {})
        progress(state.global_step, state.max_steps, "steps", **figures)


class LogShortRuns(TrainerCallback):
    """Logs the first and the last step of a run that FT_LOGGING_STEPS would give fewer than two points."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.max_steps < 2 * args.logging_steps and state.global_step in (1, state.max_steps):
            control.should_log = True


class OfferCheckpoints(TrainerCallback):
    """Tells the supervisor about each new checkpoint, which has its final name by then."""

    def __init__(self, pace: SavePace) -> None:
        self._pace = pace

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            emit("checkpoint", step=state.global_step, folder=str(folder), seconds=self._pace.save_seconds)


class EvaluationStopped(Exception):
    """A stop was requested during an evaluation. Every process raises it after the same batch."""


class DecideSaves(TrainerCallback):
    """Saves at the pace that `SavePace` allows, and stops the training once a stop is requested.

    It stops after a whole step, or between two batches of an evaluation, which it raises EvaluationStopped out of. The
    processes agree by a tiny all-reduce, since one that stopped or saved alone would leave the others waiting for it.
    Any process may ask for a stop, and the earliest deadline counts. The first process decides whether to save, since it
    measures the pace. A save that cannot be in the store before the deadline is not started.
    """

    def __init__(self, pace: SavePace, stop_deadline: Callable[[], float | None], *, paced: bool) -> None:
        self._pace, self._stop_deadline, self._paced = pace, stop_deadline, paced
        self._earliness = -math.inf
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due, self._earliness = _largest(
            args, float(state.is_world_process_zero and self._paced and self._pace.due()), self._own_earliness()
        )
        control.should_save |= bool(due)
        if math.isfinite(self._earliness) and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = self.may_save(args, state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        (self._earliness,) = _largest(args, self._own_earliness())
        if math.isfinite(self._earliness):
            self.stopped = control.should_training_stop = True
            raise EvaluationStopped

    def may_save(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether a save can still be in the store before the deadline of the stop. The same in every process."""
        first = state.is_world_process_zero
        (fits,) = _largest(args, float(first and self._pace.fits(-self._earliness)))
        if not fits and first:
            message(f"Step {state.global_step} is not saved: there is not enough time left.", "warning")
        return bool(fits)

    def _own_earliness(self) -> float:
        deadline = self._stop_deadline()
        return -math.inf if deadline is None else -deadline


def _largest(args: TrainingArguments, *values: float) -> list[float]:
    """The maximum of each value over all processes, the same in each of them."""
    if not torch.distributed.is_initialized():
        return list(values)  # without a tensor on the GPU, whose read would wait for its work
    votes = torch.tensor(values, device=meeting_device(args.device), dtype=torch.float64)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [float(vote) for vote in votes]


class RefuseNonsense(TrainerCallback):
    """Raises InputError when the loss is not a number, since every further step would be paid for and lost."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise InputError(
                f"The loss is {loss} at step {state.global_step}.",
                "Lower FT_LEARNING_RATE, or set FT_BNB_4BIT_COMPUTE_DTYPE=bfloat16 if it was float16.",
            )
