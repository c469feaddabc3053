"""Early stopping: stop when evaluations no longer improve, and keep the best adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class KeepBest(TrainerCallback):
    """Stops the training after `patience` evaluations in a row without a lower loss, and restores the best adapter.

    transformers remembers the best model as the name of a checkpoint folder, which may be on a machine that is gone. An
    adapter is small, so the best one is held in memory and saved in every checkpoint. Any checkpoint is then complete.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.loss, self.step, self._worse = math.inf, 0, 0
        self._weights: dict[str, torch.Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether none of the last `patience` evaluations was better."""
        return self._worse >= self._patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {})["eval_loss"]
        if loss < self.loss:
            self.loss, self.step, self._worse = loss, state.global_step, 0
            self._weights = {name: weight.detach().cpu().clone() for name, weight in _trained(model)}
        else:
            self._worse += 1
        if self.exhausted:
            control.should_training_stop = True

    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Copy the best adapter into the model."""
        for name, weight in _trained(model):
            if self._weights:
                weight.copy_(self._weights[name])

    def state(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "worse": self._worse, "weights": self._weights}

    def restore(self, state: dict[str, Any]) -> None:
        self.loss, self.step, self._worse = state["loss"], state["step"], state["worse"]
        self._weights = state["weights"]


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    unwrapped = getattr(model, "module", model)  # DistributedDataParallel's
    return [(name, weight) for name, weight in unwrapped.named_parameters() if weight.requires_grad]
