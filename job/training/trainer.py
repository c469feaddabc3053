"""A trainer with its own checkpoints: exact, without pickle, and never half-written under their final name."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import TrainerControl
from transformers.trainer_pt_utils import LengthGroupedSampler

from job.errors import InputError, NodeError
from job.training.best import KeepBest
from job.training.callbacks import DecideSaves, EvaluationStopped
from job.training.data_order import DataOrder, row_lengths
from job.training.evaluation import TokenLoss
from job.training.execution import Execution
from job.training.goodput import Goodput
from job.training.pace import SavePace
from job.training.ranks import gather_bytes
from job.training.sharding import allow_on_cpu, keep_loss_exact, shard_optimizer_state, whole
from job.training.state import from_bytes, load_tree, save_tree, to_bytes
from job.training.steps import PlannedTrainer

_TRAINER_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
_ADAPTER = "adapter_model.safetensors"
_HINT = "Continue with the version of this job that wrote it, or choose another FT_RUN_ID."


class AdapterTrainer(PlannedTrainer):
    """A trainer whose resumed run takes exactly the steps that the uninterrupted run would have taken.

    A checkpoint is a folder of safetensors and JSON: the adapter, the optimizer with schedule and gradient scaler, and
    for each process its generators, its place in the data and its running sums. The overridden methods are those in
    which transformers writes and reads `optimizer.pt`, `scheduler.pt`, `scaler.pt` and `rng_state.pth`, which are
    pickles.
    """

    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        pace: SavePace,
        stop: DecideSaves,
        execution: Execution,
        best: KeepBest | None = None,
        **kwargs: Any,
    ) -> None:
        self.data_order, self.best, self._pace, self._stop = DataOrder(), best, pace, stop
        self._running_sums: dict[str, Any] | None = None
        self._owes_evaluation = (
            False  # one follows the save that is being written, or came before the one that was read
        )
        self._generators_after: dict[str, Any] | None = None  # an evaluation that a checkpoint owed
        self._saved_step = -1
        self._resumed_from: str | None = None
        super().__init__(*args, execution=execution, **kwargs)
        self.add_callback(stop)
        self.goodput = Goodput(lambda: self.tokens_trained() / self.args.world_size)
        self.add_callback(self.goodput)
        if best is not None:
            self.add_callback(best)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        allow_on_cpu(self.accelerator, self.args)
        keep_loss_exact(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """transformers' sampler, except when grouping by length: it would read all rows and assume one process."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        # Group the rows of one step of all processes, so that the order is that of one process with more accumulation.
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(together, lengths=row_lengths(rows))

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = super().get_train_dataloader()
        self.data_order.watch(loader, self._train_batch_size * self.args.world_size)
        return _deaf_to_stop_signals(loader)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        return _deaf_to_stop_signals(super().get_eval_dataloader(*args, **kwargs))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.data_order.batch_trained()
        return super().training_step(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_evaluation()
        if self.control.should_training_stop:
            return
        ended = self.best is not None and self.best.exhausted
        # also true if the run was killed after the last step, before the stage ended
        if ended or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self.data_order.set_epoch(kwargs["epoch"])
        self._continue_sums()
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._continue_sums()  # in case no epoch was left to run
        self._make_up_evaluation()
        return super()._finalize_training(*args, **kwargs)

    # -- evaluating -------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save before evaluating: transformers does it the other way round, and a stop may leave time for one only.

        The checkpoint says that its evaluation is still owed. The start that resumes from it makes up for that first.
        """
        self._owes_evaluation, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        owed, self._owes_evaluation = self._owes_evaluation, False
        if owed and not self._stop.stopped:
            self.control.should_evaluate = True
            self._evaluate_or_stop(
                lambda: super(AdapterTrainer, self)._maybe_log_save_evaluate(*args, **kwargs), owed=True
            )

    def evaluate_at_the_end(self) -> None:
        """Evaluate the finished training. A stop meanwhile leaves a checkpoint, from which a later start does it."""
        self._evaluate_or_stop(self.evaluate, owed=False)

    def _evaluate_or_stop(self, evaluate: Callable[[], object], *, owed: bool) -> None:
        """Run an evaluation. If a stop ends it, save what was before it, unless that was saved already."""
        before = self._generators()
        try:
            evaluate()
        except EvaluationStopped:
            self.control.should_evaluate = False
            if self._saved_step == self.state.global_step or not self._stop.may_save(self.args, self.state):
                return
            self._set_generators(before)
            self._owes_evaluation = owed
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _make_up_evaluation(self) -> None:
        """Run the evaluation that the checkpoint owes, from the random state in which it would have started."""
        if not self._owes_evaluation:
            return
        self._owes_evaluation = False
        self._continue_sums()
        self._load_rng_state(self._resumed_from)
        self._evaluate_or_stop(lambda: self._evaluate(None, None), owed=True)
        self._generators_after = self._generators()

    # -- writing ----------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.goodput.spending("evaluation"):
            figures: dict[str, float] = super().evaluate(*args, **kwargs)
            return figures

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._token_loss = TokenLoss(
            self.args.device,
            rows=len(self.eval_dataset),
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            processes=self.args.world_size,
        )
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = self._token_loss.mean(self.accelerator)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._token_loss.without_copies(self._prepare_inputs(inputs))
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self._token_loss.add(loss, inputs["labels"])
        return loss, logits, labels

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.goodput.spending("save"):
            self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """Write a checkpoint under a temporary name, and rename it when every process's part is written."""
        began = time.monotonic()
        self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        aside = folder.with_name(f"writing-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.save_adapter(aside)
        optimizer = self._optimizer_state()
        if self.args.should_save:
            save_tree(optimizer, aside / _OPTIMIZER)
            self.state.save_to_json(str(aside / _TRAINER_STATE))
        for process, state in enumerate(self._every_process_state()):
            save_tree(state, aside / _process_file(process))
        if self.args.should_save:
            os.replace(aside, folder)
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step
        self._pace.saved(time.monotonic() - began)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter to `folder`. All processes must call this, and the first one writes."""
        model = self.accelerator.unwrap_model(self.model)
        trained = {
            name: whole(value.detach())
            for name, value in model.named_parameters(remove_duplicate=False)
            if value.requires_grad
        }
        if self.args.should_save:
            # whole embeddings are saved only where FT_MODULES_TO_SAVE trains them
            model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty template

    def _optimizer_state(self) -> dict[str, Any]:
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "optimizer": whole(self.optimizer.state_dict()),
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": self.best.state() if self.best is not None else None,
            "owes_evaluation": self._owes_evaluation,
        }

    def _process_state(self) -> dict[str, Any]:
        return {
            "processes": self.args.world_size,
            "generators": self._generators(),
            "data_order": self.data_order.state(),
            "sums": {
                "loss": self._tr_loss.detach().cpu().clone(),
                "loss_logged": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "metrics": dict(self.read_figures()),
                "tokens": self.tokens_trained(),
            },
        }

    def _generators(self) -> dict[str, Any]:
        """The states of this process's random generators."""
        on_gpu = self.args.device.type == "cuda"
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.args.device) if on_gpu else None,
        }

    def _set_generators(self, states: dict[str, Any]) -> None:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.args.device)

    def _every_process_state(self) -> list[dict[str, Any]]:
        """The states of all processes in order, on the first process. Empty on the others.

        They are gathered because processes may be on other machines, and they are small.
        """
        own = self._process_state()
        if not torch.distributed.is_initialized():
            return [own]
        everyone = gather_bytes(to_bytes(own), self.args.world_size, self.args.device)
        return [from_bytes(data) for data in everyone] if self.args.should_save else []

    # -- reading ----------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:  # with FSDP it was loaded before sharding
            self.load_adapter(Path(resume_from_checkpoint))

    def load_adapter(self, checkpoint: Path, hint: str = _HINT) -> None:
        """Load the adapter into the existing parameters, in the type in which it was trained and saved.

        transformers would load any weights that it finds, including pickles, and peft would cast them to float32.
        Raises InputError if the file cannot be read or has other layers.
        """
        file = checkpoint / _ADAPTER
        try:
            found = set_peft_model_state_dict(self.model, load_file(file))
        except (FileNotFoundError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read: {error}", hint) from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "size mismatch" not in str(error):
                raise
            raise InputError(f"The adapter in {checkpoint} has other sizes: {error}", hint) from error
        trained = {name for name, value in self.model.named_parameters() if value.requires_grad}
        missing = [name for name in found.missing_keys if name in trained]
        if found.unexpected_keys or missing:
            raise InputError(
                f"The adapter in {checkpoint} has other layers: {[*found.unexpected_keys, *missing][0]}, ….", hint
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_tree(Path(checkpoint) / _OPTIMIZER)
        self.optimizer.load_state_dict(shard_optimizer_state(self.optimizer, state["optimizer"]))
        self.lr_scheduler.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.best is not None:
            self.best.restore(state["best"])
        self._owes_evaluation = bool(state.get("owes_evaluation"))  # an older version evaluated before it saved
        self._resumed_from = checkpoint
        self._saved_step = int(Path(checkpoint).name.rpartition("-")[2])
        self._restore_process_state(Path(checkpoint))

    def _restore_process_state(self, checkpoint: Path) -> None:
        parts = len(list(checkpoint.glob("process-*.safetensors")))
        if parts != self.args.world_size:
            raise NodeError(
                f"The run was started with {parts} training processes, but now there are {self.args.world_size}.",
                f"Start it on a machine with {parts} GPUs, or set FT_NPROC_PER_NODE={parts}. "
                "To train with another number, choose another FT_RUN_ID.",
            )
        state = load_tree(checkpoint / _process_file(self.args.process_index))
        self.data_order.restore(state["data_order"])
        self._running_sums = state["sums"]

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the gradient scaler was loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._generators_after is not None:  # later than the checkpoint's
            states, self._generators_after = self._generators_after, None
            self._set_generators(states)
        elif checkpoint is not None:
            self._set_generators(load_tree(Path(checkpoint) / _process_file(self.args.process_index))["generators"])

    def _continue_sums(self) -> None:
        """Continue the sums of loss and tokens from the checkpoint.

        transformers starts again at zero. The next point of the loss curve would then be the mean of fewer steps than
        in an uninterrupted run.
        """
        if self._running_sums is None:
            return
        sums, self._running_sums = self._running_sums, None
        self._tr_loss = sums["loss"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = sums["loss_logged"], sums["last_logged"]
        self._initial_global_step = 0  # the mean loss is that of the run, not of this start
        self._metrics["train"].update(sums["metrics"])
        self._total_train_tokens = sums["tokens"]


def _process_file(process: int) -> str:
    return f"process-{process}.safetensors"


def _deaf_to_stop_signals(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Make data workers ignore SIGTERM. A signal to the whole job must not kill them, or the last step is not saved."""
    inner = getattr(loader, "base_dataloader", loader)  # inside accelerate's wrapper
    inner.worker_init_fn = functools.partial(_init_worker, inner.worker_init_fn)
    return loader


def _init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torch has just set a handler that exits
    if then is not None:
        then(worker)
