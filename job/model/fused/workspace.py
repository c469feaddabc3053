"""What the fused layers of one model share: they compute one after the other, so one of each buffer is enough."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from job.model.patches import Patches


class Workspace:
    """Passed to every fused layer of a model; `patches` ends its listening to the optimizer."""

    def __init__(self, patches: Patches) -> None:
        self.updates = 0  # optimizer steps: bitsandbytes changes parameters without moving their version counters
        self._gradient: torch.Tensor | None = None
        self._matrices: dict[Hashable, torch.Tensor] = {}
        patches.on_undo(register_optimizer_step_post_hook(self._count_update).remove)

    def matrix(self, key: Hashable, shape: tuple[int, int], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A matrix that is zero when it is made, shared by all who name the same `key`."""
        if key not in self._matrices:
            self._matrices[key] = torch.zeros(shape, device=like.device, dtype=dtype)
        return self._matrices[key]

    def leave_gradient(self, wide: torch.Tensor) -> None:
        """Remember the tensor whose first columns are the gradient of a layer's input, with room for a border beside it."""
        self._gradient = wide

    def take_gradient(self, gradient: torch.Tensor, border: int) -> torch.Tensor | None:
        """The remembered tensor, if `gradient` is in it and the room beside it is `border` columns wide.

        Autograd hands a layer the gradient alone. This finds the wider tensor around it again, without a copy.
        """
        wide, self._gradient = self._gradient, None
        if wide is None or wide.data_ptr() != gradient.data_ptr() or wide.shape[1] != gradient.shape[1] + border:
            return None
        return wide

    def forget_gradient(self) -> None:
        """A backward pass that was interrupted may have left one."""
        self._gradient = None

    def _count_update(self, *_: Any) -> None:
        self.updates += 1
