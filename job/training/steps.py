"""TRL's trainer with steps computed as planned, and with figures that stay on the GPU until they are read.

Reading a value from the GPU waits for all its work, and meanwhile nobody launches the next kernels. Two such reads are
left: which tokens have a label, once per pass (`fused/head.py`), and where rows end, once per batch that is cut
(`Execution.batches`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from trl import SFTTrainer

from job.training.captured import Result
from job.training.execution import Execution, switch_mode_only_if_another, with_less_memory
from job.training.gradients import Gradients
from job.training.optimizer import at_once


class PlannedTrainer(SFTTrainer):
    """SFTTrainer that follows the plan of `execution`. Without a plan it is plain SFTTrainer.

    Loss, gradients and figures are the same, computed in as many micro-batches as memory requires.
    """

    def __init__(self, *args: Any, execution: Execution, **kwargs: Any) -> None:
        self.execution = execution
        self._total_train_tokens: Any = 0
        self._step_started = self._batches_of_step = -1
        super().__init__(*args, **kwargs)
        self._parameters = self.model.num_parameters(exclude_embeddings=True)
        switch_mode_only_if_another(self.model, execution.patches)
        self._zero_all_gradients = self.model.zero_grad
        execution.patches.replace(self.model, "zero_grad", self._zero_gradients)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        kind, named = SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        return at_once(kind, named, args.device), named

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._batches_of_step = self._batches_of_step + 1 if self.state.global_step == self._step_started else 0
        self._step_started = self.state.global_step
        if self.execution.plan is None:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        if self.args.world_size > 1:  # no retry: the others would wait for gradients that were already summed up
            try:
                return self._in_parts(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                raise self.execution.full(error) from error
        before = Gradients(self._trained, accumulate=self.args.gradient_accumulation_steps > 1)
        return with_less_memory(
            lambda: self._in_parts(model, inputs, num_items_in_batch), self.execution, before.restore
        )

    @functools.cached_property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # Listing a 7B's parameters visits thousands of modules, which takes milliseconds in which the GPU waits.

    def _zero_gradients(self, set_to_none: bool = True) -> None:
        if self.execution.plan is None or not set_to_none:
            self._zero_all_gradients(set_to_none)
            return
        for parameter in self._trained:
            parameter.grad = None

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.execution.plan is None:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate, without visiting all parameters at each step."""
        return 6 * int(inputs["input_ids"].numel()) * int(self._parameters)

    def _in_parts(self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> torch.Tensor:
        """Forward and backward pass of the batch in micro-batches of the planned size. Returns the batch's loss.

        The loss of a micro-batch is the sum over its tokens, divided by the number of all tokens of the step. So the
        gradients add up to those of the whole step.
        """
        parts, gradients = list(self.execution.batches(inputs)), self.execution.gradients
        assert num_items_in_batch is not None or len(parts) == 1
        if gradients is not None:
            gradients.begin()
            model = model.module if isinstance(model, DistributedDataParallel) else model
        total, begin = torch.zeros((), device=self.args.device), 0
        figures = torch.zeros(3, device=self.args.device, dtype=torch.float64)
        for index, part in enumerate(parts):
            alone = gradients is not None or index + 1 == len(parts)
            self.execution.seed_dropout(self.state.global_step, self._batches_of_step, first_token=begin)
            begin += part["input_ids"].shape[1]
            with contextlib.nullcontext() if alone else self.accelerator.no_sync(model):
                found = self._pass(model, part, num_items_in_batch)
            total, figures = total + found.loss, figures + found.figures
        if gradients is not None:
            gradients.end(processes=self.args.world_size if self.accelerator.sync_gradients else 1)
        self._tell_figures(figures, tokens=begin)
        return total

    def _pass(self, model: Any, part: dict[str, Any], num_items_in_batch: torch.Tensor | None) -> Result:
        """The forward and backward pass of a micro-batch, captured if it is short."""

        def compute(part: dict[str, Any], learned: torch.Tensor | None) -> Result:
            loss = super(PlannedTrainer, self).training_step(model, part, learned)
            return Result(loss, self._figures)

        captured = self.execution.captured
        if captured is None or num_items_in_batch is None or not captured.serves(part):
            return compute(part, num_items_in_batch)
        return captured.run(part, torch.as_tensor(num_items_in_batch), compute)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's loss, with figures that are neither gathered nor read here.

        trl gathers its figures from all processes in every pass, and reads them from the GPU. Here processes may need
        different numbers of passes per batch, so they would wait for each other forever. And reads make the GPU wait.
        """
        if self.execution.plan is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        found = (outputs.label_mask, outputs.entropy.detach(), outputs.is_top1)
        self._figures = torch.stack([part.sum().double() for part in found])
        learned = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(learned).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # since gradients are averaged over processes
        return loss

    def _tell_figures(self, figures: torch.Tensor, tokens: int) -> None:
        """Record trl's metrics of the batch, over all processes: the learned tokens, their entropies, and how many were right."""
        figures = torch.nn.functional.pad(figures, (0, 1), value=float(tokens))
        if self.args.world_size > 1:
            figures = self.accelerator.reduce(figures)
        learned = figures[0].clamp(min=1)
        entropy, accuracy = figures[1] / learned, figures[2] / learned
        self._total_train_tokens += tokens if self.args.world_size == 1 else figures[3]
        told = self._metrics["train"]
        told["entropy"].append(entropy)
        told["mean_token_accuracy"].append(accuracy)
        told["num_tokens"] = [self._total_train_tokens]

    def tokens_trained(self) -> int:
        """The tokens trained so far by all processes. With several processes it waits for the GPU."""
        return round(float(self._total_train_tokens))

    def read_figures(self) -> dict[str, list[float]]:
        """Convert the metrics recorded since the last log to numbers, and return them. This waits for the GPU."""
        for figures in self._metrics.values():
            for name, values in figures.items():
                figures[name] = [value.item() if isinstance(value, torch.Tensor) else value for value in values]
            if "num_tokens" in figures:
                figures["num_tokens"] = list(map(round, figures["num_tokens"]))
        found: dict[str, list[float]] = self._metrics["train"]
        return found

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.read_figures()
        super().log(*args, **kwargs)
