"""Buffers that the fused layers of one model share. Layers run one after another, so one of each is enough."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from job.model.patches import Patches


class Workspace:
    """The shared buffers, passed to every fused layer of a model. Undoing `patches` removes the optimizer hook."""

    def __init__(self, patches: Patches) -> None:
        self.updates = 0  # optimizer steps, since bitsandbytes does not increase the parameters' version counters
        self.captures = False  # a captured pass is launched after later updates, so it must copy the adapters itself
        self._gradient: torch.Tensor | None = None
        self._matrices: dict[Hashable, torch.Tensor] = {}
        patches.on_undo(register_optimizer_step_post_hook(self._count_update).remove)

    def matrix(self, key: Hashable, shape: tuple[int, int], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrix shared by all callers with the same `key`, initially zero."""
        if key not in self._matrices:
            self._matrices[key] = torch.zeros(shape, device=like.device, dtype=dtype)
        return self._matrices[key]

    def leave_gradient(self, wide: torch.Tensor) -> None:
        """Remember `wide`: the gradient of a layer's input in the first columns, and room for a border beside it."""
        self._gradient = wide

    def take_gradient(self, gradient: torch.Tensor, border: int) -> torch.Tensor | None:
        """The remembered tensor, if it contains `gradient` and exactly `border` more columns. None otherwise.

        Autograd passes only the gradient itself. This finds the wider tensor around it without a copy.
        """
        wide, self._gradient = self._gradient, None
        if wide is None or wide.data_ptr() != gradient.data_ptr() or wide.shape[1] != gradient.shape[1] + border:
            return None
        return wide

    def forget_gradient(self) -> None:
        """Forget the remembered tensor, which may be left over from an interrupted backward pass."""
        self._gradient = None

    def _count_update(self, *_: Any) -> None:
        self.updates += 1
