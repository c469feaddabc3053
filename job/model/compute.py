"""How a model is computed: on which device, in which types, with which attention. Decided once per process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from job.model.attention import is_padding_free, is_plain_attention, register_varlen
from job.model.device import compute_dtype, device_of
from job.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The device, types and attention of this process.

    `dtype` is the type of matrix products. `padding_free` says whether a batch is one sequence without padding. `attention`
    is the implementation with which to load the model for training. None leaves the choice to transformers.
    """

    device: torch.device
    dtype: torch.dtype
    padding_free: bool
    attention: str | None

    @classmethod
    def of(cls, settings: Settings, *, local_rank: int, config: Mapping[str, Any]) -> Compute:
        """Decide for this process, from the settings and the model's config.json.

        Raises NodeError if a GPU was asked for and there is none, and InputError if FT_PADDING_FREE is not possible.
        """
        device = device_of(settings, local_rank)
        dtype = compute_dtype(settings, device)
        padding_free = is_padding_free(settings, device, config)
        varlen = padding_free and is_plain_attention(config, device)
        return cls(
            device=device,
            dtype=dtype,
            padding_free=padding_free,
            attention=register_varlen() if varlen else None,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"
