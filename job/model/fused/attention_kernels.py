"""Causal attention over rows placed one after another, made for the many short rows of instruction data.

It is FlashAttention-2 (Dao 2023, arXiv:2307.08691) with tiles that start where rows start. Each sum is computed by one
program, so the backward pass has no atomic additions, and equal inputs give equal bits. The gradients of queries and
keys are rotated back before they are stored. The comment above each kernel gives the shapes of its tensors, what one
program does, and the reasons for its tricks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from job.model.fused import MANY_TOKENS
from job.model.fused.launch import Kernel, can_describe, described

_LOG2_E = 1.4426950408889634
OWN = 64  # tokens per program


class Tuned(NamedTuple):
    """How a program loops over the tokens that its own meet: tokens per tile (`other`), warps, and loads in flight."""

    other: int
    warps: int
    stages: int


# The best of some ten each on an H100, for rows as long as guanaco's: docs/log.md
FORWARD, OF_QUERY, OF_KEY = Tuned(64, 4, 3), Tuned(32, 4, 4), Tuned(64, 4, 2)

# All kernels: query (tokens, heads, DIM), key and value (tokens, shared, DIM) with the same stride between tokens;
# tiles (programs, 3) from `tiles_of`; normalisers and products (heads, length ≥ tokens + OWN) float32; cos and sin
# (tokens, DIM). GROUP query heads share one head of keys and values. `scale` includes log2 e, since exp2 is a single
# instruction; `by` is the plain scale. A program without a tile returns, see `tiles_of`.
#
# Loops load their tiles by descriptors (TMA) where that pays, and ignore where rows end. Such a tile may hold tokens of
# the next row, or zeros after the last row. They never count: they come after the row's own tokens, so the causal mask
# drops them, and nothing is stored for them.


@triton.jit
def _tile(states, first, end, rows, column, stride, DIM: tl.constexpr, DESCRIBED: tl.constexpr):
    """A tile of (tokens, heads x head_dim): the tokens from `first` on, of the head whose columns start at `column`."""
    if DESCRIBED:
        return states.load([first, column])
    else:  # noqa: RET505 - of the two, Triton compiles one
        start = states + tl.cast(first, tl.int64) * stride + column
        known = (rows < end - first)[:, None]
        return tl.load(start + (rows[:, None] * stride + tl.arange(0, DIM)[None, :]), mask=known, other=0.0)


# out (tokens, heads, DIM). Writes out and normalisers, the log2 of the sums that the weights were divided by.
# One program computes OWN tokens of one row and one head. It loops over the row's keys up to its own tokens, with a
# running maximum and sums that are rescaled when that rises (online softmax), so no score is stored. Only tiles on the
# diagonal are masked. At the end it divides once per token instead of once per value, since a division is eight
# instructions.
@Kernel
@triton.jit
def _forward_kernel(
    query, key, value, out, normalisers, tiles, scale, length, stride, out_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, end, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    own, other = tl.arange(0, OWN), tl.arange(0, OTHER)
    inside = own < end - first
    q = _tile(query, first, end, own, head * DIM, stride, DIM, False)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    weighted = tl.zeros((OWN, DIM), tl.float32)
    column = head // GROUP * DIM
    for start in tl.range(begin, tl.minimum(first + OWN, end), OTHER, num_stages=STAGES):
        k = _tile(key, start, end, other, column, stride, DIM, DESCRIBED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if start + OTHER > first:  # on the diagonal
            scores = tl.where((own + (first - start))[:, None] >= other[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(p, 1)
        v = _tile(value, start, end, other, column, stride, DIM, DESCRIBED)
        weighted = tl.dot(p.to(v.dtype), v, weighted * kept[:, None], input_precision="ieee")
        highest = higher
    result = (weighted * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    to = out + tl.cast(first, tl.int64) * out_stride + head * DIM
    tl.store(to + (own[:, None] * out_stride + tl.arange(0, DIM)[None, :]), result, mask=inside[:, None])
    tl.store(normalisers + head * length + first + own, highest + tl.log2(total), mask=inside)


# out, of_out (tokens, heads, DIM); of_query: the first columns of (tokens, ...). Writes of_query, rotated back, and
# products, Σ out · of_out per token and head, which the gradient of softmax needs and _of_key_kernel reads: this kernel
# runs first.
# One program computes OWN tokens of one row and one head, looping over the row's keys as in the forward pass. It
# computes the weights again from the normalisers. Gradients of queries are sums over keys, and those of keys are sums
# over queries. One kernel for both would need atomic additions, so there are two.
@Kernel
@triton.jit
def _of_query_kernel(
    query, key, value, out, of_out, of_query, normalisers, products, cos, sin, tiles, scale, by, length, stride,
    out_stride, of_out_stride, of_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr, ROTATED: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, end, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    own, other = tl.arange(0, OWN), tl.arange(0, OTHER)
    inside = own < end - first
    q = _tile(query, first, end, own, head * DIM, stride, DIM, False)
    of_o = _tile(of_out, first, end, own, head * DIM, of_out_stride, DIM, False)
    o = _tile(out, first, end, own, head * DIM, out_stride, DIM, False)
    product = tl.sum(o.to(tl.float32) * of_o.to(tl.float32), 1)
    tl.store(products + head * length + first + own, product, mask=inside)
    normaliser = tl.load(normalisers + head * length + first + own, mask=inside, other=float("inf"))
    gradient = tl.zeros((OWN, DIM), tl.float32)
    column = head // GROUP * DIM
    for start in tl.range(begin, tl.minimum(first + OWN, end), OTHER, num_stages=STAGES):
        k = _tile(key, start, end, other, column, stride, DIM, DESCRIBED)
        v = _tile(value, start, end, other, column, stride, DIM, DESCRIBED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.exp2(scores - normaliser[:, None])
        p = tl.where((own + (first - start))[:, None] >= other[None, :], p, 0.0)
        of_p = tl.dot(of_o, tl.trans(v), input_precision="ieee")
        of_scores = p * (of_p - product[:, None])
        gradient = tl.dot(of_scores.to(k.dtype), k, gradient, input_precision="ieee")
    _store_rotated_back(gradient * by, of_query, cos, sin, first, own, inside, head, of_stride, DIM, OWN, ROTATED)


# of_out (tokens, heads, DIM); of_key, of_value: columns of (tokens, ...). Writes both, of_key rotated back.
# One program computes OWN tokens of one row and one head of keys and values, looping over the GROUP query heads and,
# within each, over the queries from its own tokens to the end of the row. So the sum over query heads stays in
# registers, and keys are not repeated per query head. The causal mask does not drop queries of the next row, so the
# row's end is masked too.
@Kernel
@triton.jit
def _of_key_kernel(
    query, key, value, of_out, of_key, of_value, normalisers, products, cos, sin, tiles, scale, by, length, stride,
    of_out_stride, of_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr, ROTATED: tl.constexpr
):  # fmt: skip
    tile, shared = tl.program_id(0), tl.program_id(1)
    end, first = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    own, other = tl.arange(0, OWN), tl.arange(0, OTHER)
    inside = own < end - first
    k = _tile(key, first, end, own, shared * DIM, stride, DIM, False)
    v = _tile(value, first, end, own, shared * DIM, stride, DIM, False)
    of_k = tl.zeros((OWN, DIM), tl.float32)
    of_v = tl.zeros((OWN, DIM), tl.float32)
    for member in range(GROUP):
        head = shared * GROUP + member
        for start in tl.range(first, end, OTHER, num_stages=STAGES):
            q = _tile(query, start, end, other, head * DIM, stride, DIM, DESCRIBED)
            normaliser = tl.load(normalisers + head * length + start + other)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.exp2(scores - normaliser[None, :])
            if (start < first + OWN) | (start + OTHER > end):  # on the diagonal, or where the row ends
                behind = (other + (start - first))[None, :] >= own[:, None]
                p = tl.where(behind & (other < end - start)[None, :], p, 0.0)
            of_o = _tile(of_out, start, end, other, head * DIM, of_out_stride, DIM, DESCRIBED)
            of_v = tl.dot(p.to(of_o.dtype), of_o, of_v, input_precision="ieee")
            of_p = tl.dot(v, tl.trans(of_o), input_precision="ieee")
            product = tl.load(products + head * length + start + other)
            of_scores = p * (of_p - product[None, :])
            of_k = tl.dot(of_scores.to(q.dtype), q, of_k, input_precision="ieee")
    to = of_value + tl.cast(first, tl.int64) * of_stride + shared * DIM
    to += own[:, None] * of_stride + tl.arange(0, DIM)[None, :]
    tl.store(to, of_v.to(of_value.dtype.element_ty), mask=inside[:, None])
    _store_rotated_back(of_k * by, of_key, cos, sin, first, own, inside, shared, of_stride, DIM, OWN, ROTATED)


@triton.jit
def _store_rotated_back(
    gradient, to, cos, sin, first, own, inside, head, stride, DIM: tl.constexpr, OWN: tl.constexpr, ROTATED: tl.constexpr
):  # fmt: skip
    """Store a gradient (OWN, DIM), if ROTATED turned back by its tokens' angles, which saves a pass over it later."""
    kind = to.dtype.element_ty
    known = inside[:, None]
    start = to + tl.cast(first, tl.int64) * stride + head * DIM + own[:, None] * stride
    if ROTATED:
        half: tl.constexpr = DIM // 2
        one, two = tl.split(tl.permute(tl.reshape(gradient, (OWN, 2, half)), (0, 2, 1)))
        columns = tl.arange(0, half)[None, :]
        angles = tl.cast(first, tl.int64) * DIM + (own[:, None] * DIM + columns)
        cos_first = tl.load(cos + angles, mask=known, other=0.0).to(tl.float32)
        cos_second = tl.load(cos + angles + half, mask=known, other=0.0).to(tl.float32)
        sin_first = tl.load(sin + angles, mask=known, other=0.0).to(tl.float32)
        sin_second = tl.load(sin + angles + half, mask=known, other=0.0).to(tl.float32)
        tl.store(start + columns, (one * cos_first + two * sin_first).to(kind), mask=known)
        tl.store(start + columns + half, (two * cos_second - one * sin_second).to(kind), mask=known)
    else:
        tl.store(start + tl.arange(0, DIM)[None, :], gradient.to(kind), mask=known)


def tiles_of(boundaries: torch.Tensor, tokens: int) -> torch.Tensor:
    """For each program, the beginning and end of its row and its own first token: (programs, 3) int32.

    Asking the GPU how many programs are needed would wait for it. So there are a few too many, which have no tokens.
    """
    begins, ends = boundaries[:-1], boundaries[1:]
    counts = (ends - begins + OWN - 1) // OWN
    behind = torch.cumsum(counts, 0)
    programs = torch.arange(tokens // OWN + len(begins), device=boundaries.device)
    row = torch.searchsorted(behind, programs, right=True)
    used, row = row < len(begins), row.clamp(max=len(begins) - 1)
    begin, end = begins[row], ends[row]
    first = begin + (programs - behind[row] + counts[row]) * OWN
    return torch.stack([begin, end, torch.where(used, first, end)], 1).to(torch.int32)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: torch.Tensor, scaling: float, out: torch.Tensor
) -> torch.Tensor:
    """Write the result to `out`, (tokens, heads, head_dim) like `query`.

    `key` and `value` must have `query`'s stride, and head_dim must be a power of 2. Returns the log2 of the sums that
    the weights were divided by: (heads, tokens + room for a tile) float32.
    """
    tokens, heads, dim = query.shape
    assert key.stride() == value.stride() == query.stride()
    normalisers = torch.empty(heads, tokens + OWN, device=query.device, dtype=torch.float32)
    shared = key.shape[1]
    (key, value), shape = _loaded(FORWARD, key, value)
    _forward_kernel[(len(tiles), heads)](
        query, key, value, out, normalisers, tiles, scaling * _LOG2_E, normalisers.shape[1], query.stride(0), out.stride(0),
        GROUP=heads // shared, DIM=dim, **shape,
    )  # fmt: skip
    return normalisers


def backward_(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, of_out: torch.Tensor,
    normalisers: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, tiles: torch.Tensor, scaling: float,
    place_: torch.Tensor,
) -> None:  # fmt: skip
    """Given the gradient of `forward`'s `out`, write those of query, key and value to the first columns of `place_`.

    They lie side by side in `place_` (tokens, ...). Those of query and key are rotated back by `cos` and `sin` (tokens,
    head_dim), if given.
    """
    (tokens, heads, dim), shared = query.shape, key.shape[1]
    products = torch.empty_like(normalisers)  # of out and of_out, per token and head
    length = products.shape[1]
    products[:, tokens:] = 0  # the last tiles of _of_key_kernel read them and multiply by zero, which must not give NaN
    factors, group = (scaling * _LOG2_E, scaling), heads // shared
    strides = query.stride(0), out.stride(0), of_out.stride(0), place_.stride(0)
    rotated = cos is not None
    angles = (cos, sin) if rotated else (query, query)
    (keys, values), shape = _loaded(OF_QUERY, key, value)
    _of_query_kernel[(len(tiles), heads)](
        query, keys, values, out, of_out, place_, normalisers, products, *angles, tiles, *factors, length, *strides,
        GROUP=group, DIM=dim, ROTATED=rotated, **shape,
    )  # fmt: skip
    (queries, of_outs), shape = _loaded(OF_KEY, query, of_out)
    of_key, of_value = place_[:, heads * dim :], place_[:, (heads + shared) * dim :]
    _of_key_kernel[(len(tiles), shared)](
        queries, key, value, of_outs, of_key, of_value, normalisers, products, *angles, tiles, *factors, length,
        strides[0], *strides[2:], GROUP=group, DIM=dim, ROTATED=rotated, **shape,
    )  # fmt: skip


def _loaded(tuned: Tuned, *parts: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
    """The tensors that a loop loads, (tokens, heads, head_dim) each, as descriptors or matrices, and its constants."""
    matrices = [part.flatten(1) for part in parts]
    by_descriptors = len(parts[0]) >= MANY_TOKENS and all(map(can_describe, matrices))
    if by_descriptors:
        matrices = [described(matrix, tuned.other, parts[0].shape[2]) for matrix in matrices]
    constants = {"OWN": OWN, "OTHER": tuned.other, "STAGES": tuned.stages, "DESCRIBED": by_descriptors}
    return matrices, {**constants, "num_warps": tuned.warps}
