"""The kernels behind `pointwise`: products are PyTorch's, what lies between them is limited by memory, and passes over it
once. All arithmetic is in float32; results are rounded where the plain versions round.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
import triton
import triton.language as tl

_BLOCK = 2048
_HEADS = 8  # rotated by one program


@triton.jit
def _rms_norm_kernel(x, weight, out, columns, out_stride, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + row * columns + offsets, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    scales = tl.load(weight + offsets, mask=inside, other=0.0)
    normalised = (wide * inverse).to(values.dtype).to(tl.float32)  # rounded here, as the plain version has it
    tl.store(out + row * out_stride + offsets, (normalised * scales.to(tl.float32)).to(values.dtype), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    gradient, x, weight, residual, out, columns, residual_stride, out_stride, epsilon, BLOCK: tl.constexpr
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
    own = inverse * (scaled - normalised * (tl.sum(scaled * normalised, 0) / columns))
    passed = tl.load(residual + row * residual_stride + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + offsets, (own + passed).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    heads, cos, sin, out, count, half, heads_stride, out_stride, BACK: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
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
    if BACK:
        sin_first, sin_second = -sin_first, -sin_second
    at = rows[:, None] * (2 * half) + columns[None, :]
    inside = (rows < count)[:, None] & known[None, :]
    first = tl.load(heads + token * heads_stride + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(heads + token * heads_stride + at + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    to = out + token * out_stride + at
    tl.store(to, (first * cos_first - second * sin_first).to(kind), mask=inside)
    tl.store(to + half, (second * cos_second + first * sin_second).to(kind), mask=inside)


@triton.jit
def _gated_kernel(gate_up, out, columns, gate_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gate = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_stride + columns + offsets, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out + row * out_stride + offsets, (opened * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def _gated_backward_kernel(gradient, gate_up, out, columns, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gates, ups = gate_up + row * gate_stride + offsets, gate_up + row * gate_stride + columns + offsets
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    kind = gate_up.dtype.element_ty
    opened = (gate * sigmoid).to(kind).to(tl.float32)
    tl.store(out + row * columns + offsets, (opened * up).to(kind), mask=inside)
    tl.store(gates, (given * up * sigmoid * (1 + gate * (1 - sigmoid))).to(kind), mask=inside)
    tl.store(ups, (given * gate * sigmoid).to(kind), mask=inside)


@triton.jit(do_not_specialize=["seed", "first_row"])
def _dropout_kernel(x, out, columns, stride, probability, seed, first_row, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    kept = tl.rand(seed, (first_row + row) * columns + offsets) >= probability
    values = tl.load(x + row.to(tl.int64) * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    dropped = tl.where(kept, values / (1 - probability), 0.0)
    tl.store(out + row.to(tl.int64) * columns + offsets, dropped.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_kernel(x, out, scales, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    wide = tl.load(x + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), 1e-12) / 448.0
    tl.store(scales + row, scale)
    tl.store(out + row * columns + offsets, (wide / scale).to(tl.float8e4nv), mask=inside)


@triton.jit
def _label_log_probs_kernel(logits, labels, log_probs, entropies, first, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * columns
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


@triton.jit
def _dequantize_kernel(packed, scales, codes, out, columns, out_stride, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pairs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < columns // 2
    place = row * (columns // 2) + pairs
    both = tl.load(packed + place, mask=inside, other=0)
    scale = tl.load(scales + place * 2 // GROUP, mask=inside, other=0.0)
    first = tl.load(codes + (both >> 4).to(tl.int32)) * scale
    second = tl.load(codes + (both & 15).to(tl.int32)) * scale
    columns_of = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns_of, values, mask=columns_of < columns)


@triton.jit(do_not_specialize=["scale"])
def _place_kernel(values, out, rows, columns, stride, out_stride, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (offsets < columns)
    found = tl.load(values + row * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + offsets, (found * scale).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    rows, columns = x.shape
    _rms_norm_kernel[(rows,)](x, weight, out, columns, out.stride(0), epsilon, **_one_row(columns))
    return out


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    rows, columns = x.shape
    _rms_norm_backward_kernel[(rows,)](
        gradient, x, weight, residual, out, columns, residual.stride(0), out.stride(0), epsilon, **_one_row(columns)
    )
    return out


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, back: bool) -> None:
    tokens, count, dim = heads.shape
    grid, block = (tokens, triton.cdiv(count, _HEADS)), triton.next_power_of_2(dim // 2)
    strides = heads.stride(0), out.stride(0)
    _rotate_kernel[grid](heads, cos, sin, out, count, dim // 2, *strides, BACK=back, BLOCK=block, HEADS=_HEADS)


def gated(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    grid = (rows, triton.cdiv(columns, _BLOCK))
    _gated_kernel[grid](gate_up, out, columns, gate_up.stride(0), out.stride(0), BLOCK=_BLOCK)
    return out


def gated_backward_(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    rows, columns = gradient.shape
    out = torch.empty_like(gradient)
    grid = (rows, triton.cdiv(columns, _BLOCK))
    _gated_backward_kernel[grid](gradient, gate_up, out, columns, gate_up.stride(0), BLOCK=_BLOCK)
    return out


def dropout(x: torch.Tensor, probability: float, seed: int, first_row: int = 0) -> torch.Tensor:
    rows, columns = x.shape
    out = torch.empty(rows, columns, device=x.device, dtype=x.dtype)
    grid = (rows, triton.cdiv(columns, _BLOCK))
    _dropout_kernel[grid](x, out, columns, x.stride(0), probability, seed, first_row, BLOCK=_BLOCK)
    return out


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    _quantize_kernel[(rows,)](x, out, scales, columns, **_one_row(columns))
    return out, scales


def label_log_probs_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = logits.shape
    log_probs, entropies = (torch.empty(rows, device=logits.device, dtype=torch.float32) for _ in range(2))
    first = torch.empty(rows, device=logits.device, dtype=torch.bool)
    if rows:
        _label_log_probs_kernel[(rows,)](logits, labels, log_probs, entropies, first, columns, BLOCK=4096, num_warps=8)
    return log_probs, entropies, first


def dequantize(weight: bnb.nn.Params4bit, out: torch.Tensor) -> None:
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    rows, columns = out.shape
    grid = (rows, triton.cdiv(columns, _BLOCK))
    _dequantize_kernel[grid](
        weight.data.view(torch.uint8),
        scales,
        state.code,
        out,
        columns,
        out.stride(0),
        GROUP=state.blocksize,
        BLOCK=_BLOCK // 2,
    )


def place(values: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    rows, columns = values.shape
    block = min(1024, triton.next_power_of_2(columns))
    height = max(1, 4096 // block)
    grid = (triton.cdiv(rows, height), triton.cdiv(columns, block))
    _place_kernel[grid](values, out, rows, columns, values.stride(0), out.stride(0), scale, ROWS=height, BLOCK=block)


def _one_row(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}
