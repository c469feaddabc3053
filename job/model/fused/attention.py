"""Attention in the fused layer, without autograd: forward, and the gradients with respect to the unrotated heads.

Three implementations give the same numbers: our own kernels where they were measured to be faster, PyTorch's kernels,
and PyTorch's plain attention row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from job.model.attention import for_each_head, is_served, row_by_row
from job.model.device import is_hopper
from job.model.fused import pointwise


@dataclass(frozen=True)
class Rows:
    """The rows of a batch: where they begin and end, and the positions of their tokens.

    `cos` and `sin` of the positions are (tokens, rotated), where only the first `rotated` values of a head are rotated.
    They are None in layers without positions. `boundaries` is (rows + 1), `longest` the most tokens of a row.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    boundaries: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Attended:
    """The result of attention, `out` (tokens, heads x head_dim), and its backward pass.

    `gradients_into_(of_out, place_)` writes the gradients of the unrotated queries, keys and values side by side into
    the first columns of `place_`, (tokens, ...).
    """

    out: torch.Tensor
    gradients_into_: Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Scores:
    """How scores are computed: multiplied by `scaling`, within a `window`, limited by a `softcap` (see `Decoder`)."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scores: Scores, out: torch.Tensor
) -> Attended:
    """Causal attention within each row, also written into the first columns of `out`.

    `query`, `key` and `value` are views of one tensor, (tokens, heads, head_dim) each. `query` and `key` are rotated
    already. `key` and `value` may have fewer heads.
    """
    if scores.window is not None and scores.window >= rows.longest:
        scores = replace(scores, window=None)
    if not is_served(query) or scores.softcap is not None:
        return _row_by_row(query, key, value, rows, scores, out)
    way = _by_own_kernels if _is_served_by_own(query) and scores.window is None else _by_torch_kernels
    return way(query, key, value, rows, scores, out)


def _is_served_by_own(query: torch.Tensor) -> bool:
    """Only on Hopper, where they were measured. Elsewhere PyTorch's kernels are the safer choice."""
    return query.shape[-1] in (64, 128) and is_hopper(query.device)


def _by_own_kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scores: Scores, out: torch.Tensor
) -> Attended:
    from job.model.fused import attention_kernels

    tiles = _tiles(rows.boundaries, len(query))
    attended = out[:, : query[0].numel()]
    normalisers = attention_kernels.forward(query, key, value, tiles, scores.scaling, attended.view_as(query))

    def gradients_into_(of_out: torch.Tensor, place_: torch.Tensor) -> None:
        whole = rows.cos is not None and rows.cos.shape[1] == query.shape[2]
        angles = (rows.cos, rows.sin) if whole else (None, None)
        attention_kernels.backward_(
            query, key, value, attended.view_as(query), of_out.view_as(query), normalisers, *angles, tiles, scores.scaling,
            place_,
        )  # fmt: skip
        if not whole:
            pointwise.rotate_back_(place_, query.shape[1] + key.shape[1], query.shape[2], rows.cos, rows.sin)

    return Attended(attended, gradients_into_)


@functools.lru_cache(maxsize=1)
def _tiles(boundaries: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tiles of a batch, computed once for all layers, which are all passed the same `boundaries` tensor."""
    from job.model.fused import attention_kernels

    return attention_kernels.tiles_of(boundaries, tokens)


def _by_torch_kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scores: Scores, out: torch.Tensor
) -> Attended:
    """Call the two operations that `varlen_attn` wraps, which saves the host autograd's overhead."""
    shared, key, value = key.shape[1], for_each_head(query, key), for_each_head(query, value)
    arguments = (rows.boundaries, rows.boundaries, rows.longest, rows.longest, 0.0, True)  # no dropout; causal
    named = {"scale": scores.scaling, "window_size_left": None if scores.window is None else scores.window - 1}
    attended, normalisers, *seeds, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *arguments, False, **named
    )
    flat = attended.flatten(1)
    pointwise.place(flat, out[:, : flat.shape[1]])

    def gradients_into_(of_out: torch.Tensor, place_: torch.Tensor) -> None:
        of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
            of_out.view_as(attended), query, key, value, attended, normalisers, *arguments, *seeds, **named
        )
        if shared != query.shape[1]:
            of_key, of_value = (part.unflatten(1, (shared, -1)).sum(2) for part in (of_key, of_value))
        pointwise.rotate_back(of_query, of_key, of_value, rows.cos, rows.sin, place_)

    return Attended(flat, gradients_into_)


def _row_by_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows, scores: Scores, out: torch.Tensor
) -> Attended:
    with torch.enable_grad():
        query, key, value = inputs = [part.detach().requires_grad_() for part in (query, key, value)]
        attended = row_by_row(
            query, key, value, rows.boundaries.tolist(), scores.scaling, scores.window, scores.softcap
        )
    flat = attended.detach().flatten(1)
    pointwise.place(flat, out[:, : flat.shape[1]])

    def gradients_into_(of_out: torch.Tensor, place_: torch.Tensor) -> None:
        of_query, of_key, of_value = torch.autograd.grad(attended, inputs, of_out.view_as(attended))
        pointwise.rotate_back(of_query, of_key, of_value, rows.cos, rows.sin, place_)

    return Attended(flat, gradients_into_)
