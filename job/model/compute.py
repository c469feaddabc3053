"""What a model is computed on: the device, the types, the attention. Decided once per process, and handed on."""

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
    """`dtype` is the type of matrix products, `adapter_dtype` the one in which the adapter is trained.

    `padding_free` says whether a batch is one sequence without padding. `attention` is the implementation to load the
    model with for training; None is transformers' choice.
    """

    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    padding_free: bool
    attention: str | None

    @classmethod
    def of(cls, settings: Settings, *, local_rank: int, config: Mapping[str, Any]) -> Compute:
        """What this process computes on, given the settings and the model's config.json.

        NodeError if a GPU was asked for and there is none, InputError if FT_PADDING_FREE cannot be served.
        """
        device = device_of(settings, local_rank)
        dtype = compute_dtype(settings, device)
        padding_free = is_padding_free(settings, device, config)
        varlen = padding_free and is_plain_attention(config)
        return cls(
            device=device,
            dtype=dtype,
            adapter_dtype=_adapter_dtype(settings, dtype),
            padding_free=padding_free,
            attention=register_varlen() if varlen else None,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def _adapter_dtype(settings: Settings, products: torch.dtype) -> torch.dtype:
    """bfloat16 for 4-bit models, as trl has it; else float32.

    Products in float32 (the CPU) would only lose digits with a bfloat16 adapter. Scaled float16 gradients need float32. So
    do shards: they are cast when they are gathered, and torch's AdamW keeps its moments in the type of its parameters.
    """
    whole_bfloat16 = products == torch.bfloat16 and settings.use_4bit and settings.sharding == "none"
    return torch.bfloat16 if whole_bfloat16 else torch.float32
