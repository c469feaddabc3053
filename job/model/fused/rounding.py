"""Rows in 8-bit floats, e4m3, as `pointwise` writes them and matrix products take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rounded(NamedTuple):
    """`values` (rows, columns) in e4m3, and `scales` (rows, 1) in float32: a row is their product."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, like: torch.Tensor, columns: int) -> Rounded:
        """For as many rows as `like` has, on its device."""
        return cls(
            torch.empty(len(like), columns, device=like.device, dtype=torch.float8_e4m3fn),
            torch.empty(len(like), 1, device=like.device, dtype=torch.float32),
        )
