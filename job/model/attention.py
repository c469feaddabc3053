"""Attention over rows placed one after another in one sequence, without padding.

`torch.nn.attention.varlen` is PyTorch's own FlashAttention-2 (Dao 2023, arXiv:2307.08691) for such sequences. It needs
no further package and no attention mask. A dense mask would take memory quadratic in the batch's tokens.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from job.errors import InputError
from job.model.architectures import LARGEST_HEAD, Decoder, NotDescribed, has_odd_heads
from job.settings import Settings

VARLEN = "varlen"


def is_padding_free(settings: Settings, device: torch.device, config: Mapping[str, Any]) -> bool:
    """Whether batches are one sequence without padding, which only changes how long a step takes.

    Raises InputError if FT_PADDING_FREE asks for it but the model needs another attention than this module's.
    """
    wanted = settings.padding_free
    if settings.packing:
        return True
    if wanted is True and not is_plain_attention(config, device):
        raise InputError(
            "FT_PADDING_FREE=true: this model's attention is not known to work without padding.",
            "Set FT_PADDING_FREE=auto.",
        )
    if wanted != "auto":
        return bool(wanted)
    served = _has_kernel(device) or settings.decoder_layers == "fused"
    return served and is_plain_attention(config, device)


def is_plain_attention(config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether tokens attend to those before them by softmax, at most with a window: no sink, bias or dropout.

    A cap of the scores counts as plain on the CPU only. No kernel has it, and without one a GPU would need memory that
    grows with the square of a row's length.
    """
    try:
        decoder = Decoder.of(config)
    except NotDescribed:  # for reasons that may have nothing to do with attention
        known = config.get("model_type") in ("llama", "qwen2", "qwen3") and not config.get("use_sliding_window")
        return known and not config.get("attention_dropout") and not has_odd_heads(config)
    return decoder.softcap is None or device.type == "cpu"


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def register_varlen() -> str:
    """Register the attention with transformers. Returns the name to pass as `attn_implementation`.

    No mask function is registered with it, so transformers builds no mask. To build one it would ask the GPU where rows
    start, and wait for the answer.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    return VARLEN


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row, with transformers' signature. Returns (1, tokens, heads, head_dim).

    `query` is (1, heads, tokens, head_dim). `key` and `value` may have fewer heads. Row i is the tokens from
    `cu_seq_lens_q[i]` to `cu_seq_lens_q[i + 1]`.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "varlen attention needs batches without padding"
    assert dropout == 0.0, "this attention does not support dropout of its weights"
    assert others.get("s_aux") is None, "this attention does not support sinks"
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    window, softcap = others.get("sliding_window"), others.get("softcap")
    return attend(q, k, v, cu_seq_lens_q, int(max_length_q), scaling, window, softcap).unsqueeze(0), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention within each row: (tokens, heads, head_dim) like `query`. `key` and `value` may have fewer heads.

    Row i is the tokens from `boundaries[i]` to `boundaries[i + 1]`, and the longest row has `longest` tokens. A token
    attends to the last `window` tokens, itself included. `softcap` limits scores by c · tanh(score / c).
    """
    causal = _causal_arguments(window if window is not None and window < longest else None)
    if causal is None or softcap is not None or not is_served(query):
        return row_by_row(query, key, value, boundaries.tolist(), scaling, window, softcap)
    key, value = for_each_head(query, key), for_each_head(query, value)
    out = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, scale=scaling, **causal)
    assert isinstance(out, torch.Tensor)
    return out


def is_served(query: torch.Tensor) -> bool:
    """Whether PyTorch's kernel supports these heads' type and size on this card."""
    known = (
        query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= LARGEST_HEAD
    )
    return known and _has_kernel(query.device)


def for_each_head(query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Keys or values repeated for each head of `query`, as torch 2.11's kernel requires."""
    repeats = query.shape[1] // states.shape[1]
    return states.repeat_interleave(repeats, 1) if repeats > 1 else states


def row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: list[int],
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attend` by PyTorch's plain attention, for cards, types and caps that the kernel does not support."""
    grouped, rows = query.shape[1] != key.shape[1], []
    for begin, end in itertools.pairwise(boundaries):
        q, k, v = (states[begin:end].transpose(0, 1).unsqueeze(0) for states in (query, key, value))
        seen = None if window is None or window >= end - begin else _seen(end - begin, window, query.device)
        if softcap is None:
            named = {"is_causal": True} if seen is None else {"attn_mask": seen}
            rows.append(scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=grouped, **named)[0])
        else:
            seen = _seen(end - begin, end - begin, query.device) if seen is None else seen
            rows.append(_capped(q[0], k[0], v[0], scaling, softcap, seen))
    return torch.cat(rows, dim=1).transpose(0, 1)


def _seen(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Which tokens each token attends to: (tokens, tokens)."""
    ones = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, softcap: float, seen: torch.Tensor
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2; arXiv:2408.00118) over one row, (heads, tokens, head_dim) each."""
    repeats = len(q) // len(k)
    k, v = (states.repeat_interleave(repeats, 0) for states in (k, v))
    scores = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1, dtype=torch.float32).to(v.dtype) @ v


_WINDOWS = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.11 has only `is_causal`


def _causal_arguments(window: int | None) -> dict[str, Any] | None:
    """What `varlen_attn` calls causal attention, with a window (how far a token looks back). None if it has no windows."""
    if _WINDOWS:
        return {"window_size": (-1 if window is None else window - 1, 0)}
    return {"is_causal": True} if window is None else None
