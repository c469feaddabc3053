"""What ties trl's trainer to the job: progress, checkpoints for the syncer, stop requests, a guard against NaN."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from job.errors import InputError
from job.report.events import emit, message, progress
from job.run import Run


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the trainer has just written its checkpoint."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class ReportProgress(TrainerCallback):
    """Steps, loss and rate to the supervisor: every logged step, and at least every second in between."""

    def __init__(self) -> None:
        self._figures: dict[str, Any] = {}
        self._last_event = 0.0
        self._tokens, self._since = 0.0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.monotonic()

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
            message(f"Step {state.global_step}: evaluation loss {logs['eval_loss']:.4f} nats a token.")
        if "loss" in logs:
            self._figures = {"loss": float(logs["loss"]), "learning_rate": float(logs["learning_rate"])}
            tokens, moment = float(logs.get("num_tokens", 0)), time.monotonic()
            if tokens > self._tokens > 0:
                self._figures["tokens_per_second"] = (tokens - self._tokens) / (moment - self._since)
            self._tokens, self._since = tokens, moment
            self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self._last_event > 1:
            self._report(state)

    def _report(self, state: TrainerState) -> None:
        self._last_event = time.monotonic()
        progress(state.global_step, state.max_steps, "steps", **self._figures)


class KeepDataOrder(TrainerCallback):
    """Makes a resumed epoch visit the rows in the order in which it began.

    The sampler that groups rows by length shuffles with torch's global generator when an epoch starts. The trainer
    restores that generator only behind the skipped batches, so the order would be another one: some rows twice, some
    never. The state at the epoch's start therefore goes into every checkpoint.
    """

    FILE = "epoch_start_rng.safetensors"

    def __init__(self, checkpoint: Path | None) -> None:
        file = checkpoint / self.FILE if checkpoint is not None else None
        self._to_restore = load_file(file)["torch_cpu"] if file is not None and file.is_file() else None
        self._state: torch.Tensor | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._to_restore is not None:
            torch.set_rng_state(self._to_restore)
            self._to_restore = None
        self._state = torch.get_rng_state()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._state is not None:
            save_file({"torch_cpu": self._state}, checkpoint_folder(args, state) / self.FILE)


class OfferCheckpoints(TrainerCallback):
    """Tells the supervisor of a checkpoint once every rank has written its part of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            emit("checkpoint", step=state.global_step, folder=str(checkpoint_folder(args, state)))


class HonourStopRequests(TrainerCallback):
    """Ends the training behind a whole step, with a checkpoint, once a stop is requested.

    The ranks agree by a one-number all-reduce: one that stopped alone would leave the others waiting for it.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._agreed(args) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def _agreed(self, args: TrainingArguments) -> bool:
        requested = self._run.stop_requested()
        if not torch.distributed.is_initialized():
            return requested
        votes = torch.tensor([int(requested)], device=args.device)
        torch.distributed.all_reduce(votes)
        return bool(votes.item())


class RefuseNonsense(TrainerCallback):
    """Ends the training when the loss is no number: every further step would be paid for and lost."""

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
