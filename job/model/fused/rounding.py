"""Rows in 8-bit floats (e4m3), as `pointwise` writes them and matrix products take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rounded(NamedTuple):
    """Rounded rows: `values` (rows, columns) in e4m3, times `scales` (rows, 1) in float32."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, columns: int) -> Rounded:
        """An uninitialized `Rounded` with as many rows as `like`, on its device."""
        return cls(
            torch.empty(len(like), columns, device=like.device, dtype=torch.float8_e4m3fn),
            torch.empty(len(like), 1, device=like.device, dtype=torch.float32),
        )
