"""Causal attention over rows that lie one behind the other, for the many short rows of instruction data.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) in tiles that begin where rows begin. Each sum is one program's own, so that
the backward pass has no atomic additions: the same numbers again for the same input. Gradients of queries and keys are
rotated back to before their rotary positions on the way out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from job.model.fused.launch import Kernel

_LOG2_E = 1.4426950408889634


OWN = 64  # tokens of a program


class Tuned(NamedTuple):
    """How a program passes over the tokens that its own meet: this many at a time, in so many warps and loads ahead."""

    other: int
    warps: int
    stages: int


# found on an H200 among some ten of each, for rows of guanaco's lengths: BENCHMARKS.md
FORWARD, OF_QUERY, OF_KEY = Tuned(32, 4, 3), Tuned(32, 4, 3), Tuned(64, 4, 2)


@Kernel
@triton.jit
def _forward_kernel(
    query, key, value, out, normalisers, tiles, scale, tokens, stride, out_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, end, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    columns = tl.arange(0, DIM)
    rows = first + tl.arange(0, OWN)
    inside = rows < end
    q = tl.load(_at(query, rows, head, columns, stride, DIM), mask=inside[:, None], other=0.0)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    weighted = tl.zeros((OWN, DIM), tl.float32)
    for start in tl.range(begin, tl.minimum(first + OWN, end), OTHER, num_stages=STAGES):
        others = start + tl.arange(0, OTHER)
        known = (others < end)[:, None]
        k = tl.load(_at(key, others, head // GROUP, columns, stride, DIM), mask=known, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(rows[:, None] >= others[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(p, 1)
        v = tl.load(_at(value, others, head // GROUP, columns, stride, DIM), mask=known, other=0.0)
        weighted = tl.dot(p.to(v.dtype), v, weighted * kept[:, None], input_precision="ieee")
        highest = higher
    result = (weighted / total[:, None]).to(out.dtype.element_ty)
    tl.store(_at(out, rows, head, columns, out_stride, DIM), result, mask=inside[:, None])
    tl.store(normalisers + head * tokens + rows, highest + tl.log2(total), mask=inside)


@Kernel
@triton.jit
def _of_query_kernel(
    query, key, value, out, of_out, of_query, normalisers, products, cos, sin, tiles, scale, by, tokens, stride,
    out_stride, of_out_stride, of_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    begin, end, first = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    columns = tl.arange(0, DIM)
    rows = first + tl.arange(0, OWN)
    inside = rows < end
    q = tl.load(_at(query, rows, head, columns, stride, DIM), mask=inside[:, None], other=0.0)
    of_o = tl.load(_at(of_out, rows, head, columns, of_out_stride, DIM), mask=inside[:, None], other=0.0)
    o = tl.load(_at(out, rows, head, columns, out_stride, DIM), mask=inside[:, None], other=0.0)
    product = tl.sum(o.to(tl.float32) * of_o.to(tl.float32), 1)
    tl.store(products + head * tokens + rows, product, mask=inside)
    normaliser = tl.load(normalisers + head * tokens + rows, mask=inside, other=float("inf"))
    gradient = tl.zeros((OWN, DIM), tl.float32)
    for start in tl.range(begin, tl.minimum(first + OWN, end), OTHER, num_stages=STAGES):
        others = start + tl.arange(0, OTHER)
        known = (others < end)[:, None]
        k = tl.load(_at(key, others, head // GROUP, columns, stride, DIM), mask=known, other=0.0)
        v = tl.load(_at(value, others, head // GROUP, columns, stride, DIM), mask=known, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        p = tl.where(rows[:, None] >= others[None, :], tl.exp2(scores - normaliser[:, None]), 0.0)
        of_p = tl.dot(of_o, tl.trans(v), input_precision="ieee")
        of_scores = p * (of_p - product[:, None])
        gradient = tl.dot(of_scores.to(k.dtype), k, gradient, input_precision="ieee")
    _store_rotated_back(gradient * by, of_query, cos, sin, rows, inside, head, of_stride, DIM, OWN)


@Kernel
@triton.jit
def _of_key_kernel(
    query, key, value, of_out, of_key, of_value, normalisers, products, cos, sin, tiles, scale, by, tokens, stride,
    of_out_stride, of_stride,
    GROUP: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    tile, shared = tl.program_id(0), tl.program_id(1)
    end, first = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    if first >= end:
        return
    columns = tl.arange(0, DIM)
    rows = first + tl.arange(0, OWN)
    inside = rows < end
    k = tl.load(_at(key, rows, shared, columns, stride, DIM), mask=inside[:, None], other=0.0)
    v = tl.load(_at(value, rows, shared, columns, stride, DIM), mask=inside[:, None], other=0.0)
    of_k = tl.zeros((OWN, DIM), tl.float32)
    of_v = tl.zeros((OWN, DIM), tl.float32)
    for member in range(GROUP):
        head = shared * GROUP + member
        for start in tl.range(first, end, OTHER, num_stages=STAGES):
            others = start + tl.arange(0, OTHER)
            known = others < end
            q = tl.load(_at(query, others, head, columns, stride, DIM), mask=known[:, None], other=0.0)
            normaliser = tl.load(normalisers + head * tokens + others, mask=known, other=float("inf"))
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            p = tl.where(others[None, :] >= rows[:, None], tl.exp2(scores - normaliser[None, :]), 0.0)
            of_o = tl.load(_at(of_out, others, head, columns, of_out_stride, DIM), mask=known[:, None], other=0.0)
            of_v = tl.dot(p.to(of_o.dtype), of_o, of_v, input_precision="ieee")
            of_p = tl.dot(v, tl.trans(of_o), input_precision="ieee")
            product = tl.load(products + head * tokens + others, mask=known, other=0.0)
            of_scores = p * (of_p - product[None, :])
            of_k = tl.dot(of_scores.to(q.dtype), q, of_k, input_precision="ieee")
    tl.store(
        _at(of_value, rows, shared, columns, of_stride, DIM), of_v.to(of_value.dtype.element_ty), mask=inside[:, None]
    )
    _store_rotated_back(of_k * by, of_key, cos, sin, rows, inside, shared, of_stride, DIM, OWN)


@triton.jit
def _at(states, rows, head, columns, stride, DIM: tl.constexpr):
    """Of (tokens, heads, head_dim), whose tokens lie `stride` apart."""
    return states + rows.to(tl.int64)[:, None] * stride + head * DIM + columns[None, :]


@triton.jit
def _store_rotated_back(
    gradient, to, cos, sin, rows, inside, head, stride, DIM: tl.constexpr, OWN: tl.constexpr
):  # fmt: skip
    half: tl.constexpr = DIM // 2
    first, second = tl.split(tl.permute(tl.reshape(gradient, (OWN, 2, half)), (0, 2, 1)))
    columns = tl.arange(0, half)
    angles = rows.to(tl.int64)[:, None] * DIM + columns[None, :]
    known = inside[:, None]
    cos_first = tl.load(cos + angles, mask=known, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angles + half, mask=known, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angles, mask=known, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angles + half, mask=known, other=0.0).to(tl.float32)
    kind = to.dtype.element_ty
    place = _at(to, rows, head, columns, stride, DIM)
    tl.store(place, (first * cos_first + second * sin_first).to(kind), mask=known)
    tl.store(place + half, (second * cos_second - first * sin_second).to(kind), mask=known)


def tiles_of(boundaries: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of each program: where its row begins and ends, and its first token; (programs, 3) int32, made on the GPU. As the GPU
    is not asked how many are needed, some at the end have no token."""
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
    """The result, into `out`, (tokens, heads, head_dim) as `query`; returns the logarithms, to base 2, of the sums that the
    weights were divided by, (heads, tokens) float32. `key` and `value` have `query`'s stride, and head_dim is a power of 2."""
    tokens, heads, dim = query.shape
    assert key.stride() == value.stride() == query.stride()
    normalisers = torch.empty(heads, tokens, device=query.device, dtype=torch.float32)
    _forward_kernel[(len(tiles), heads)](
        query, key, value, out, normalisers, tiles, scaling * _LOG2_E, tokens, query.stride(0), out.stride(0),
        GROUP=heads // key.shape[1], DIM=dim, OWN=OWN, OTHER=FORWARD.other, STAGES=FORWARD.stages, num_warps=FORWARD.warps,
    )  # fmt: skip
    return normalisers


def backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, of_out: torch.Tensor,
    normalisers: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, tiles: torch.Tensor, scaling: float,
    place: torch.Tensor,
) -> None:  # fmt: skip
    """For the gradient of `forward`'s `out`, those of query, key and value, side by side into the first columns of `place`,
    (tokens, ...), the first two rotated back by `cos` and `sin`, (tokens, head_dim)."""
    tokens, heads, dim = query.shape
    shared = key.shape[1]
    products = torch.empty_like(normalisers)  # of each result and its gradient
    factors = scaling * _LOG2_E, scaling
    strides = query.stride(0), out.stride(0), of_out.stride(0), place.stride(0)
    shape = {"GROUP": heads // shared, "DIM": dim, "OWN": OWN}
    of_key, of_value = place[:, heads * dim :], place[:, (heads + shared) * dim :]
    _of_query_kernel[(len(tiles), heads)](
        query, key, value, out, of_out, place, normalisers, products, cos, sin, tiles, *factors, tokens, *strides,
        **shape, OTHER=OF_QUERY.other, STAGES=OF_QUERY.stages, num_warps=OF_QUERY.warps,
    )  # fmt: skip
    _of_key_kernel[(len(tiles), shared)](
        query, key, value, of_out, of_key, of_value, normalisers, products, cos, sin, tiles, *factors, tokens,
        strides[0], *strides[2:], **shape, OTHER=OF_KEY.other, STAGES=OF_KEY.stages, num_warps=OF_KEY.warps,
    )  # fmt: skip
