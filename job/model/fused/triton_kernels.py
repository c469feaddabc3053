"""The kernels of `pointwise`, except the gate's. Memory traffic limits them, so each reads and writes values once.

All arithmetic is in float32, and results are rounded where the plain versions round. The comment above each kernel
gives the shapes of its tensors, what one program does, and the reasons for its tricks. Strides are between rows. Where
no stride is passed, rows are contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import bitsandbytes as bnb
import torch
import triton
import triton.language as tl

from job.model.fused.launch import Kernel, cdiv, next_power_of_2
from job.model.fused.rounding import Rounded

_BLOCK = 2048
_HEADS = 8  # heads that one program rotates


@triton.jit
def scale_of(largest):
    """The scale of a row, which maps its largest value to 448, the largest of e4m3."""
    return tl.maximum(largest, 1e-12) / 448.0


# x, add (rows, columns); weight (columns); out (rows, ≥ columns); inverses, scales (rows, 1) float32; rounded (rows,
# columns). Writes out and inverses, with ADD x (the sum of x and add), with ROUND rounded and scales.
# One program normalizes one row. It holds the row in registers, so the mean of squares, the norm, the largest value and
# the rounding need no second read. The residual sum is computed here because its result is loaded anyway.
@Kernel
@triton.jit
def _rms_norm_kernel(
    x, add, weight, out, inverses, rounded, scales, columns, out_stride, epsilon,
    BLOCK: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    at = row * columns + offsets
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        both = values.to(tl.float32) + tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
        values = both.to(values.dtype)
        tl.store(x + at, values, mask=inside)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    tl.store(inverses + row, inverse)
    by = tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    normalised = (wide * inverse).to(weight.dtype.element_ty).to(tl.float32)  # rounded here, as in the plain version
    result = (normalised * by).to(values.dtype)
    tl.store(out + row * out_stride + offsets, result, mask=inside)
    if ROUND:
        scale = scale_of(tl.max(tl.abs(result.to(tl.float32)), 0))
        tl.store(scales + row, scale)
        tl.store(rounded + row * columns + offsets, (result.to(tl.float32) / scale).to(tl.float8e4nv), mask=inside)


# gradient, x (rows, columns); weight (columns); residual, out (rows, ≥ columns); rounded (rows, columns); scales (rows,
# 1). Writes out, with ROUND rounded and scales. Reads residual only with ADD.
# One program computes one row, held in registers. It recomputes the row's factor, since x is needed anyway. The
# residual's gradient is added here, which saves a pass over both.
@Kernel
@triton.jit
def _rms_norm_backward_kernel(
    gradient, x, weight, residual, out, rounded, scales, columns, residual_stride, out_stride, epsilon,
    BLOCK: tl.constexpr, ADD: tl.constexpr, ROUND: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    at = row * columns + offsets
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    normalised = wide * inverse
    whole = inverse * (scaled - normalised * (tl.sum(scaled * normalised, 0) / columns))
    if ADD:
        whole += tl.load(residual + row * residual_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    result = whole.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + offsets, result, mask=inside)
    if ROUND:
        scale = scale_of(tl.max(tl.abs(result.to(tl.float32)), 0))
        tl.store(scales + row, scale)
        tl.store(rounded + row * columns + offsets, (result.to(tl.float32) / scale).to(tl.float8e4nv), mask=inside)


# heads, out (tokens, count, dim); cos, sin (tokens, 2 · half). Writes the first 2 · half values of each head of out, which
# may be heads.
# One program rotates HEADS heads of one token, so that the token's angles are loaded once for all of them. Both halves
# of a head are loaded before either is stored, which makes the rotation in place safe.
@Kernel
@triton.jit
def _rotate_kernel(
    heads, cos, sin, out, count, half, dim, heads_stride, out_stride, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    angles = token * 2 * half + columns
    known = columns < half
    cos_first = tl.load(cos + angles, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + angles + half, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + angles, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + angles + half, mask=known, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None] * dim + columns[None, :]
    inside = (rows < count)[:, None] & known[None, :]
    first = tl.load(heads + token * heads_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + token * heads_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    to = out + token * out_stride + at
    tl.store(to, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(to + half, (second * cos_second + first * sin_second).to(kind), mask=inside)


# heads (tokens, count, dim) with a stride; weights (count, dim); before (tokens, count, dim) contiguous. Writes before, the
# old values, and heads.
# One program norms HEADS heads of one token, held in registers. The old values are stored on the way, since the backward
# pass needs them and they are loaded here anyway.
@Kernel
@triton.jit
def _norm_heads_kernel(heads, weights, before, count, dim, stride, epsilon, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    at = rows[:, None] * dim + columns[None, :]
    inside = (rows < count)[:, None] & (columns < dim)[None, :]
    values = tl.load(heads + token * stride + at, mask=inside, other=0.0)
    tl.store(before + token * count * dim + at, values, mask=inside)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / dim + epsilon)
    normalised = (wide * inverse[:, None]).to(weights.dtype.element_ty).to(tl.float32)
    by = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(heads + token * stride + at, (normalised * by).to(values.dtype), mask=inside)


# gradient (tokens, count, dim) with a stride; before (tokens, count, dim) contiguous; weights (count, dim). Overwrites
# gradient by that of before.
# One program computes HEADS heads of one token, held in registers.
@Kernel
@triton.jit
def _norm_heads_backward_kernel(
    gradient, before, weights, count, dim, stride, epsilon, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    rows, columns = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    at = rows[:, None] * dim + columns[None, :]
    inside = (rows < count)[:, None] & (columns < dim)[None, :]
    wide = tl.load(before + token * count * dim + at, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(gradient + token * stride + at, mask=inside, other=0.0).to(tl.float32)
    scaled *= tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / dim + epsilon)[:, None]
    normalised = wide * inverse
    own = inverse * (scaled - normalised * (tl.sum(scaled * normalised, 1) / dim)[:, None])
    tl.store(gradient + token * stride + at, own.to(gradient.dtype.element_ty), mask=inside)


# query (tokens, heads, 2 · half); key, value (tokens, shared, 2 · half), all gradients; cos, sin (tokens, 2 · half);
# out (tokens, ≥ (heads + 2 · shared) · 2 · half). Writes out: queries, keys and values side by side.
# One program handles HEADS of the heads + 2 · shared heads of one token. Each row is a head of one of the three
# tensors. The other loads are masked and give zero, so a sum selects the right one. Values are only copied. One kernel
# instead of two rotations and a copy: each gradient is read and written once, right where the next product needs it.
@Kernel
@triton.jit
def _rotate_back_kernel(
    query, key, value, cos, sin, out, heads, shared, half, out_stride, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    known = (columns < half)[None, :]
    rows = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    of_query = (rows < heads) & known
    of_key = (rows >= heads) & (rows < heads + shared) & known
    of_value = (rows >= heads + shared) & (rows < heads + 2 * shared) & known
    dim = 2 * half
    q = query + (token * heads + rows) * dim + columns[None, :]
    k = key + (token * shared + rows - heads) * dim + columns[None, :]
    v = value + (token * shared + rows - heads - shared) * dim + columns[None, :]
    first = tl.load(q, mask=of_query, other=0.0).to(tl.float32) + tl.load(k, mask=of_key, other=0.0).to(tl.float32)
    second = tl.load(q + half, mask=of_query, other=0.0).to(tl.float32)
    second += tl.load(k + half, mask=of_key, other=0.0).to(tl.float32)
    angles = (token * dim + columns)[None, :]
    cos_first = tl.load(cos + angles, mask=known, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angles + half, mask=known, other=0.0).to(tl.float32)
    sin_first = -tl.load(sin + angles, mask=known, other=0.0).to(tl.float32)
    sin_second = -tl.load(sin + angles + half, mask=known, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    to = out + token * out_stride + rows * dim + columns[None, :]
    rotated = of_query | of_key
    tl.store(to, (first * cos_first - second * sin_first).to(kind), mask=rotated)
    tl.store(to + half, (second * cos_second + first * sin_second).to(kind), mask=rotated)
    tl.store(to, tl.load(v, mask=of_value, other=0.0), mask=of_value)
    tl.store(to + half, tl.load(v + half, mask=of_value, other=0.0), mask=of_value)


@triton.jit
def _drop(x, out, offsets, columns, drawn, probability, ADD: tl.constexpr):
    """Drop and scale the values at `offsets`; with ADD, add them to `out`."""
    inside = offsets < columns
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    dropped = tl.where(drawn >= probability, values / (1 - probability), 0.0)
    if ADD:
        dropped += tl.load(out + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, dropped.to(out.dtype.element_ty), mask=inside)


# x (rows, columns) with a stride; out (rows, columns) contiguous. Writes out, with ADD the sum with its old values.
# With LATER, moment (2) int64 is added to seed and first_row. One program drops 4 · PART columns of one row. Philox is a function of seed and counter, so the same seed and place in
# the batch give the same mask, and none is stored. It draws four numbers at once and takes longer than the memory
# traffic, so each of the four serves another PART of the columns. seed and first_row change all the time: specializing
# on them would compile the kernel again and again.
@Kernel
@triton.jit(do_not_specialize=["seed", "first_row"])
def _dropout_kernel(
    x, out, moment, columns, stride, probability, seed, first_row, ADD: tl.constexpr, LATER: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    if LATER:
        seed += tl.load(moment)
        first_row += tl.load(moment + 1).to(tl.int32)  # with 64 bits, Philox would draw other numbers
    row, block = tl.program_id(0), tl.program_id(1)
    places = tl.arange(0, PART)
    first, second, third, fourth = tl.rand4x(seed, ((first_row + row) * tl.num_programs(1) + block) * PART + places)
    x, out = x + row.to(tl.int64) * stride, out + row.to(tl.int64) * columns
    offsets = block * 4 * PART + places
    _drop(x, out, offsets, columns, first, probability, ADD)
    _drop(x, out, offsets + PART, columns, second, probability, ADD)
    _drop(x, out, offsets + 2 * PART, columns, third, probability, ADD)
    _drop(x, out, offsets + 3 * PART, columns, fourth, probability, ADD)


# x, out (rows, columns); scales (rows, 1) float32. Writes out in e4m3, and scales.
# One program rounds one row, which it holds in registers: the scale is known only after the last value, and nothing is
# read twice.
@Kernel
@triton.jit
def _quantize_kernel(x, out, scales, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    wide = tl.load(x + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(wide), 0))
    tl.store(scales + row, scale)
    tl.store(out + row * columns + offsets, (wide / scale).to(tl.float8e4nv), mask=inside)


# logits (rows, vocabulary) with a stride; labels, log_probs, entropies, first (rows). Writes the last three, and overwrites logits
# with the gradient of the log-probability, onehot - p.
# One program handles one row, too long for registers, in blocks. The first pass keeps a running maximum and rescales
# its sums when that rises (online softmax), so it reads the logits once, not three times. It also sums exp(logit) ·
# logit, since the entropy is log Σ exp(logit) - Σ p · logit. The second pass writes the gradient in place: no second
# tensor of this size.
@Kernel
@triton.jit
def _label_log_probs_kernel(logits, labels, log_probs, entropies, first, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    label = tl.load(labels + row)
    labels_logit = tl.load(start + label).to(tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)  # of exp(logit - highest)
    weighted = tl.full((), 0.0, tl.float32)  # of exp(logit - highest) * logit
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        values = tl.load(start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        shrunk = tl.exp(highest - higher)
        powers = tl.exp(values - higher)
        total = total * shrunk + tl.sum(powers, 0)
        weighted = weighted * shrunk + tl.sum(tl.where(inside, powers * values, 0.0), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    tl.store(log_probs + row, labels_logit - normaliser)
    tl.store(entropies + row, normaliser - weighted / total)
    tl.store(first + row, labels_logit >= highest)
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        values = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.where(offsets == label, 1.0, 0.0) - tl.exp(values - normaliser)
        tl.store(start + offsets, gradient.to(logits.dtype.element_ty), mask=inside)


_WEIGHT = tl.constexpr(8)  # numbers that describe a 4-bit weight


# weights (count, 8) int64, per weight: the addresses of its packed bytes, scales, code of the scales, scales of the
# scales, their offset, its 16 codes and its rows of the output, and the number of rows. like: any tensor of the
# output's type. Writes (rows, columns) per weight, with out_stride. A scale serves GROUP values. SCALES is 0 if scales
# are float32, or the number of 8-bit scales that share a scale (nested quantization).
# One program dequantizes 2 · BLOCK columns of one row of the weight with its number in the grid. A table of addresses
# lets one launch serve all weights of a product. Each byte holds two values: they are interleaved so that stores are
# contiguous. Rows go straight into the wider bordered matrix, whereas bitsandbytes' own kernel writes contiguous
# matrices only.
@Kernel
@triton.jit
def _dequantize_kernel(
    weights, like, columns, out_stride, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = weights + tl.program_id(2) * _WEIGHT
    if row < tl.load(weight + 7):
        pairs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = pairs < columns // 2
        place = row * (columns // 2) + pairs
        both = tl.load(tl.load(weight).to(tl.pointer_type(tl.uint8)) + place, mask=inside, other=0)
        group = place * 2 // GROUP
        if SCALES:
            stored = tl.load(tl.load(weight + 1).to(tl.pointer_type(tl.uint8)) + group, mask=inside, other=0)
            values = tl.load(tl.load(weight + 2).to(tl.pointer_type(tl.float32)) + stored.to(tl.int32))
            shared = tl.load(weight + 3).to(tl.pointer_type(tl.float32)) + group // SCALES
            scale = values * tl.load(shared, mask=inside, other=0.0)
            scale += tl.load(tl.load(weight + 4).to(tl.pointer_type(tl.float32)))
        else:
            scale = tl.load(tl.load(weight + 1).to(tl.pointer_type(tl.float32)) + group, mask=inside, other=0.0)
        codes = tl.load(weight + 5).to(tl.pointer_type(tl.float32))
        first = tl.load(codes + (both >> 4).to(tl.int32)) * scale
        second = tl.load(codes + (both & 15).to(tl.int32)) * scale
        columns_of = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        out = tl.load(weight + 6).to(like.dtype) + row * out_stride
        tl.store(out + columns_of, tl.interleave(first, second).to(like.dtype.element_ty), mask=columns_of < columns)


_COPY = tl.constexpr(5)  # numbers that describe a copy


# copies (count, 5) int64, per copy: the addresses of source and destination, columns, rows, and the destination's
# stride. scales (count) float32. like_values, like_out: any tensors of the sources' and the destinations' type.
# One program copies BLOCK consecutive values of the copy with its number in the grid, times its scale. A table of
# addresses lets one launch copy all adapters of a product, since launches cost the host more than these small copies
# cost the GPU.
@Kernel
@triton.jit
def _place_all_kernel(copies, scales, like_values, like_out, BLOCK: tl.constexpr):
    copy = copies + tl.program_id(1) * _COPY
    columns, rows, out_stride = tl.load(copy + 2), tl.load(copy + 3), tl.load(copy + 4)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows * columns
    found = tl.load(tl.load(copy).to(like_values.dtype) + place, mask=inside, other=0.0).to(tl.float32)
    found *= tl.load(scales + tl.program_id(1))
    to = tl.load(copy + 1).to(like_out.dtype) + place // columns * out_stride + place % columns
    tl.store(to, found.to(like_out.dtype.element_ty), mask=inside)


# values (rows, columns), factors (rows, 1) float32, out (rows, ≥ columns). Writes out. Reads factors only with TIMES.
# One program copies a tile of ROWS × BLOCK values. They are 4,096 whatever the shape, since borders have few columns.
@Kernel
@triton.jit
def _place_kernel(
    values, factors, out, rows, columns, stride, out_stride, TIMES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (offsets < columns)
    found = tl.load(values + row * stride + offsets, mask=inside, other=0.0)
    if TIMES:
        found = found.to(tl.float32) * tl.load(factors + row, mask=row < rows, other=0.0)
    tl.store(out + row * out_stride + offsets, found.to(out.dtype.element_ty), mask=inside)


def rms_norm_(
    x_: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    rounded: Rounded | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, columns = x_.shape
    inverses = torch.empty(rows, 1, device=x_.device, dtype=torch.float32)
    if rows:
        _rms_norm_kernel[(rows,)](
            x_, x_ if add is None else add, weight, out, inverses, *(rounded or (x_, x_)), columns, out.stride(0),
            epsilon, **_one_row(columns), ADD=add is not None, ROUND=rounded is not None,
        )  # fmt: skip
    return inverses


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    rounded: Rounded | None = None,
) -> torch.Tensor:
    rows, columns = x.shape
    if rows:
        _rms_norm_backward_kernel[(rows,)](
            gradient, x, weight, x if residual is None else residual, out, *(rounded or (x, x)), columns,
            0 if residual is None else residual.stride(0), out.stride(0), epsilon,
            **_one_row(columns), ADD=residual is not None, ROUND=rounded is not None,
        )  # fmt: skip
    return out


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    (tokens, count, dim), half = heads.shape, cos.shape[1] // 2
    grid, block = (tokens, cdiv(count, _HEADS)), next_power_of_2(half)
    strides = heads.stride(0), out.stride(0)
    _rotate_kernel[grid](heads, cos, sin, out, count, half, dim, *strides, BLOCK=block, HEADS=_HEADS)


def norm_heads_(heads_: torch.Tensor, weights: torch.Tensor, epsilon: float, before: torch.Tensor) -> None:
    (tokens, count, dim), grid, shape = heads_.shape, *_some_heads(heads_)
    assert tokens and before.is_contiguous() and weights.is_contiguous()
    _norm_heads_kernel[grid](heads_, weights, before, count, dim, heads_.stride(0), epsilon, **shape)


def norm_heads_backward_(gradient_: torch.Tensor, before: torch.Tensor, weights: torch.Tensor, epsilon: float) -> None:
    (tokens, count, dim), grid, shape = gradient_.shape, *_some_heads(gradient_)
    assert tokens and before.is_contiguous() and weights.is_contiguous()
    _norm_heads_backward_kernel[grid](gradient_, before, weights, count, dim, gradient_.stride(0), epsilon, **shape)


def _some_heads(heads: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    tokens, count, dim = heads.shape
    return (tokens, cdiv(count, _HEADS)), {"BLOCK": next_power_of_2(dim), "HEADS": _HEADS}


def rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    tokens, heads, dim = query.shape
    shared = key.shape[1]
    grid, block = (tokens, cdiv(heads + 2 * shared, _HEADS)), next_power_of_2(dim // 2)
    _rotate_back_kernel[grid](
        query, key, value, cos, sin, out, heads, shared, dim // 2, out.stride(0), BLOCK=block, HEADS=_HEADS
    )


def dropout_(
    x: torch.Tensor,
    probability: float,
    seed: int,
    first_row: int = 0,
    moment: torch.Tensor | None = None,
    *,
    add_to_: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, columns = x.shape
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype) if add_to_ is None else add_to_
    assert out.is_contiguous()
    part = min(1024, next_power_of_2(cdiv(columns, 4)))  # it determines which values are dropped
    grid = (rows, cdiv(columns, 4 * part))
    _dropout_kernel[grid](
        x, out, x if moment is None else moment, columns, x.stride(0), probability, seed, first_row,
        ADD=add_to_ is not None, LATER=moment is not None, PART=part,
    )  # fmt: skip
    return out


def quantize_rows(x: torch.Tensor) -> Rounded:
    x = x.contiguous()
    rows, columns = x.shape
    found = Rounded.empty(x, columns)
    _quantize_kernel[(rows,)](x, *found, columns, **_one_row(columns))
    return found


def label_log_probs_(logits_: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = logits_.shape
    log_probs, entropies = (torch.empty(rows, device=logits_.device, dtype=torch.float32) for _ in range(2))
    first = torch.empty(rows, device=logits_.device, dtype=torch.bool)
    if rows:
        _label_log_probs_kernel[(rows,)](
            logits_, labels, log_probs, entropies, first, columns, logits_.stride(0), BLOCK=4096, num_warps=8
        )
    return log_probs, entropies, first


def dequantize(weights: Sequence[bnb.nn.Params4bit], outs: Sequence[torch.Tensor]) -> None:
    described: list[int] = []
    for weight, out in zip(weights, outs, strict=True):
        state, first = weight.quant_state, weight.data
        inner = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (first, first, first)
        parts = (first, state.absmax, *inner, state.code, out)
        described += [*(part.data_ptr() for part in parts), len(out)]
    state, columns = weights[0].quant_state, outs[0].shape[1]
    grid = (max(map(len, outs)), cdiv(columns, _BLOCK), len(outs))
    _dequantize_kernel[grid](
        _numbers(outs[0].device, *described), outs[0], columns, outs[0].stride(0), GROUP=state.blocksize,
        SCALES=state.state2.blocksize if state.nested else 0, BLOCK=_BLOCK // 2,
        enable_fp_fusion=False,  # a scale's product and sum are rounded separately, as in bitsandbytes
    )  # fmt: skip


def place_all(values: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scales: Sequence[float]) -> None:
    described: list[int] = []
    for one, out in zip(values, outs, strict=True):
        described += [one.data_ptr(), out.data_ptr(), one.shape[1], one.shape[0], out.stride(0)]
    device, most = outs[0].device, max(one.numel() for one in values)
    _place_all_kernel[(cdiv(most, _BLOCK), len(outs))](
        _numbers(device, *described), _numbers(device, *map(float, scales)), values[0], outs[0], BLOCK=_BLOCK
    )


@functools.lru_cache(maxsize=2**16, typed=True)
def _numbers(device: torch.device, *values: float) -> torch.Tensor:
    """Addresses and shapes, or factors, as a tensor on the GPU. Cached, since they stay the same from step to step.

    Captured passes read these tensors where they are, so the cache holds more than any model needs.
    """
    whole = isinstance(values[0], int)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float32, device=device)


def place(values: torch.Tensor, out: torch.Tensor, factors: torch.Tensor | None = None) -> None:
    rows, columns = values.shape
    block = min(1024, next_power_of_2(columns))
    height = max(1, 4096 // block)
    grid = (cdiv(rows, height), cdiv(columns, block))
    _place_kernel[grid](
        values, values if factors is None else factors, out, rows, columns, values.stride(0), out.stride(0),
        TIMES=factors is not None, ROWS=height, BLOCK=block,
    )  # fmt: skip


def _one_row(columns: int) -> dict[str, int]:
    block = next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}
