"""The kernels of the gate, act(gate) · up, and of the adapters' products with its values.

The gate's values are the widest of a layer, so each pass over them costs as much as several passes elsewhere. The
adapters' narrow products need the same values and are therefore computed while these are in registers. Each sum is
computed by one program in a fixed order, so equal inputs give equal bits. Rows are tokens. The comment above each
kernel gives the shapes of its tensors, what one program does, and the reasons for its tricks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from job.model.device import is_hopper
from job.model.fused import MANY_TOKENS
from job.model.fused.launch import Kernel, can_describe, cdiv, described
from job.model.fused.rounding import Rounded
from job.model.fused.triton_kernels import scale_of

_BLOCK = 2048
_LARGEST_RANK = 128  # the largest whose sums fit in a program's registers


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter does not support a GPU's instructions
_RANKS = 64  # ranks of the smallest matrix instruction; fewer are padded with zeros


class Tuned(NamedTuple):
    """Rows and columns (`block`) of a tile, warps, loads in flight (`stages`), and about how many programs per SM."""

    rows: int
    block: int
    warps: int
    stages: int
    programs: int


# The best of some ten each on an H200, for a 7B's gate: docs/log.md
GATED_NARROW, GATED_ADAPTED = Tuned(64, 128, 4, 2, 4), Tuned(32, 128, 8, 3, 2)


@triton.jit
def _sigmoid(x):
    """The sigmoid in four instructions, within two units in the last place of float32. Triton's own takes twelve."""
    if _INTERPRETED:
        return tl.sigmoid(x)
    else:  # noqa: RET505 - of the two, Triton compiles one
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",  # 1 / (1 + 2 ** (-x log2 e))
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


_SCALE, _CUBE = tl.constexpr(1.5957691216057308), tl.constexpr(0.044715)  # of the GELU by tanh, as in `pointwise`


# GELU chooses the activation: gate · sigmoid(z), where z is the gate itself (silu), or a cubic polynomial of it (the GELU
# by tanh).
@triton.jit
def _opened(gate, kind, GELU: tl.constexpr):
    """act(gate), rounded where the plain version rounds."""
    inner = gate
    if GELU:
        inner = _SCALE * gate * (1 + _CUBE * gate * gate)
    return (gate * _sigmoid(inner)).to(kind).to(tl.float32)


@triton.jit
def _gradients(gate, up, given, kind, GELU: tl.constexpr):
    """act(gate) · up, and its gradients with respect to gate and up. `given` is the gradient of the result."""
    if GELU:
        squared = gate * gate
        sigmoid = _sigmoid(_SCALE * gate * (1 + _CUBE * squared))
        opened = gate * sigmoid
        slope = sigmoid + opened * (1 - sigmoid) * (_SCALE * (1 + 3 * _CUBE * squared))
    else:
        sigmoid = _sigmoid(gate)
        opened = gate * sigmoid
        slope = sigmoid + opened * (1 - sigmoid)
    act = (opened.to(kind).to(tl.float32) * up).to(kind)
    return act, (given * up * slope).to(kind), (given * opened).to(kind)


# gate_up (tokens, 2 · columns); out (tokens, ≥ columns). Writes out.
# One program computes BLOCK columns of one row.
@Kernel
@triton.jit
def _gated_kernel(gate_up, out, columns, gate_stride, out_stride, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gate = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_stride + columns + offsets, mask=inside, other=0.0)
    kind = gate.dtype
    act = (_opened(gate.to(tl.float32), kind, GELU) * up.to(tl.float32)).to(kind)
    tl.store(out + row * out_stride + offsets, act, mask=inside)


# gradient, out (tokens, columns) contiguous; gate_up (tokens, 2 · columns). Overwrites gate_up with its gradient, and
# writes act(gate) · up to out again: it is not kept, and all its inputs are loaded here anyway.
# One program computes BLOCK columns of one row, of gate and of up.
@Kernel
@triton.jit
def _gated_backward_kernel(gradient, gate_up, out, columns, gate_stride, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gates, ups = gate_up + row * gate_stride + offsets, gate_up + row * gate_stride + columns + offsets
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    act, of_gate, of_up = _gradients(gate, up, given, gate_up.dtype.element_ty, GELU)
    tl.store(out + row * columns + offsets, act, mask=inside)
    tl.store(gates, of_gate, mask=inside)
    tl.store(ups, of_up, mask=inside)


# As _gated_kernel, and also writes rounded (tokens, columns) in e4m3 and scales (tokens, 1).
# One program computes a whole row, since the row's scale is known only at its end. Then it reads the row back from
# `out` while that is still in the cache. The barrier makes the stores of all its threads visible first.
@Kernel
@triton.jit
def _gated_rounded_kernel(
    gate_up, out, rounded, scales, columns, gate_stride, out_stride, BLOCK: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        gate = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0)
        up = tl.load(gate_up + row * gate_stride + columns + offsets, mask=inside, other=0.0)
        kind = gate.dtype
        act = (_opened(gate.to(tl.float32), kind, GELU) * up.to(tl.float32)).to(kind)
        tl.store(out + row * out_stride + offsets, act, mask=inside)
        largest = tl.maximum(largest, tl.max(tl.abs(act.to(tl.float32)), 0))
    tl.debug_barrier()
    scale = scale_of(largest)
    tl.store(scales + row, scale)
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        wide = tl.load(out + row * out_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(rounded + row * columns + offsets, (wide / scale).to(tl.float8e4nv), mask=inside)


# As _gated_backward_kernel, and also writes the gradient of gate_up to rounded (tokens, 2 · columns) and scales
# (tokens, 1).
# One program computes a whole row and reads it back from the cache, as in _gated_rounded_kernel.
@Kernel
@triton.jit
def _gated_backward_rounded_kernel(
    gradient, gate_up, out, rounded, scales, columns, gate_stride, BLOCK: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        gates, ups = gate_up + row * gate_stride + offsets, gate_up + row * gate_stride + columns + offsets
        gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(gradient + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
        act, of_gate, of_up = _gradients(gate, up, given, gate_up.dtype.element_ty, GELU)
        tl.store(out + row * columns + offsets, act, mask=inside)
        tl.store(gates, of_gate, mask=inside)
        tl.store(ups, of_up, mask=inside)
        both = tl.maximum(tl.abs(of_gate.to(tl.float32)), tl.abs(of_up.to(tl.float32)))
        largest = tl.maximum(largest, tl.max(both, 0))
    tl.debug_barrier()
    scale = scale_of(largest)
    tl.store(scales + row, scale)
    for begin in range(0, 2 * columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < 2 * columns
        wide = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(rounded + row * 2 * columns + offsets, (wide / scale).to(tl.float8e4nv), mask=inside)


# The next two kernels load tiles by descriptors (TMA), which takes a third fewer instructions per loop and fills tiles
# with zeros outside of a tensor. Their narrow products have the gate's values on the right: Triton would compute a tile
# twice if it were both stored and on the left side of a product.


# gate_up (tokens, 2 · columns) and a (ranks, columns) as descriptors; out (tokens, ≥ columns); sums (parts, tokens,
# ranks) float32. Writes act(gate) · up to out, and to sums its product with aᵀ, one part of the columns each.
# One program handles ROWS tokens and part_columns columns. Several parts per row fill the GPU. The caller adds their
# sums in a fixed order, whereas atomic additions would give other bits each time.
@Kernel
@triton.jit
def _gated_narrow_kernel(
    gate_up, a, out, sums, tokens, columns, ranks, out_stride, part_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    first, begin = tl.program_id(0) * ROWS, tl.program_id(1) * part_columns
    rows = tl.arange(0, ROWS)
    present = rows < tokens - first
    outs = out + tl.cast(first, tl.int64) * out_stride + rows[:, None] * out_stride
    total = tl.zeros((RANKS, ROWS), tl.float32)
    for at in tl.range(begin, tl.minimum(begin + part_columns, columns), BLOCK, num_stages=STAGES):
        gate, up = gate_up.load([first, at]), gate_up.load([first, columns + at])
        kind = gate.dtype
        act = (_opened(gate.to(tl.float32), kind, GELU) * up.to(tl.float32)).to(kind)
        offsets = at + tl.arange(0, BLOCK)
        tl.store(outs + offsets[None, :], act, mask=present[:, None] & (offsets < columns)[None, :])
        total = tl.dot(a.load([0, at]), tl.trans(act), total, input_precision="ieee")
    rank = tl.arange(0, RANKS)
    to = sums + (tl.cast(tl.program_id(1), tl.int64) * tokens + first + rows[:, None]) * ranks + rank[None, :]
    tl.store(to, tl.trans(total), mask=present[:, None] & (rank < ranks)[None, :])


# gate_up (tokens, 2 · columns), gradient (tokens, columns), of_down, narrow_gate, narrow_up (tokens, their ranks) as
# descriptors; out is gate_up again as a pointer; sums (parts, (down_ranks + gate_ranks + up_ranks) · columns) float32.
# Overwrites gate_up with its gradient, and writes to sums the gradients of down's A, gate's B and up's B, one part of
# the tokens each. DOWN, GATE and UP say which of the adapters exist.
# One program handles BLOCK columns and part_tokens tokens: the sums run over tokens, so they stay in registers while
# tiles of ROWS tokens pass by. act(gate) · up is needed for down's A only, and never stored. The caller adds the parts
# in a fixed order.
@Kernel
@triton.jit
def _gated_adapted_kernel(
    gate_up, gradient, of_down, narrow_gate, narrow_up, out, sums, tokens, columns, down_ranks, gate_ranks, up_ranks,
    gate_scale, up_scale, out_stride, part_tokens,
    DOWN: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, STAGES: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    column, begin = tl.program_id(0) * BLOCK, tl.program_id(1) * part_tokens
    columns_of = column + tl.arange(0, BLOCK)
    known = columns_of < columns
    end = tl.minimum(begin + part_tokens, tokens)
    rows = tl.arange(0, ROWS)
    for_down = tl.zeros((RANKS, BLOCK), tl.float32)
    for_gate = tl.zeros((RANKS, BLOCK), tl.float32)
    for_up = tl.zeros((RANKS, BLOCK), tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        gate = gate_up.load([first, column]).to(tl.float32)
        up = gate_up.load([first, columns + column]).to(tl.float32)
        given = gradient.load([first, column]).to(tl.float32)
        act, of_gate, of_up = _gradients(gate, up, given, out.dtype.element_ty, GELU)
        gates = out + tl.cast(first, tl.int64) * out_stride + (rows[:, None] * out_stride + columns_of[None, :])
        inside = (rows < end - first)[:, None] & known[None, :]
        tl.store(gates, of_gate, mask=inside)
        tl.store(gates + columns, of_up, mask=inside)
        if DOWN:
            for_down = tl.dot(tl.trans(of_down.load([first, 0])), act, for_down, input_precision="ieee")
        if GATE:
            for_gate = tl.dot(tl.trans(narrow_gate.load([first, 0])), of_gate, for_gate, input_precision="ieee")
        if UP:
            for_up = tl.dot(tl.trans(narrow_up.load([first, 0])), of_up, for_up, input_precision="ieee")
    # one after another: down's A (down_ranks, columns), gate's B (columns, gate_ranks), up's B (columns, up_ranks)
    wide, rank = tl.cast(columns, tl.int64), tl.arange(0, RANKS)
    to = sums + tl.program_id(1) * wide * (down_ranks + gate_ranks + up_ranks)
    if DOWN:
        place = to + rank[:, None] * wide + columns_of[None, :]
        tl.store(place, for_down, mask=(rank < down_ranks)[:, None] & known[None, :])
    if GATE:
        place = to + wide * down_ranks + columns_of[:, None] * gate_ranks + rank[None, :]
        tl.store(place, tl.trans(for_gate * gate_scale), mask=known[:, None] & (rank < gate_ranks)[None, :])
    if UP:
        place = to + wide * (down_ranks + gate_ranks) + columns_of[:, None] * up_ranks + rank[None, :]
        tl.store(place, tl.trans(for_up * up_scale), mask=known[:, None] & (rank < up_ranks)[None, :])


def gated(gate_up: torch.Tensor, out: torch.Tensor, rounded: Rounded | None = None, gelu: bool = False) -> torch.Tensor:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    strides = gate_up.stride(0), out.stride(0)
    if rounded is not None:
        _gated_rounded_kernel[(rows,)](gate_up, out, *rounded, columns, *strides, BLOCK=_BLOCK, GELU=gelu)
        return out
    _gated_kernel[(rows, cdiv(columns, _BLOCK))](gate_up, out, columns, *strides, BLOCK=_BLOCK, GELU=gelu)
    return out


def gated_backward_(
    gradient: torch.Tensor, gate_up_: torch.Tensor, rounded: Rounded | None = None, gelu: bool = False
) -> torch.Tensor:
    rows, columns = gradient.shape
    out = torch.empty_like(gradient)
    if rounded is not None:
        _gated_backward_rounded_kernel[(rows,)](
            gradient, gate_up_, out, *rounded, columns, gate_up_.stride(0), BLOCK=_BLOCK, GELU=gelu
        )
        return out
    grid = (rows, cdiv(columns, _BLOCK))
    _gated_backward_kernel[grid](gradient, gate_up_, out, columns, gate_up_.stride(0), BLOCK=_BLOCK, GELU=gelu)
    return out


def serves(values: Sequence[torch.Tensor], narrow: Sequence[torch.Tensor | None]) -> bool:
    """Whether the two functions below can load these tensors by descriptors, and are known to be faster.

    They are for Hopper, 16 bits, and so many tokens that the host has time to create descriptors. `values` are the
    gate's tensors, `narrow` those with a dimension of ranks.
    """
    parts = [part for part in narrow if part is not None]
    return (
        is_hopper(values[0].device)
        and values[0].element_size() == 2
        and len(values[0]) >= MANY_TOKENS
        and all(min(part.shape) <= _LARGEST_RANK for part in parts)
        and all(can_describe(part) for part in (*values, *parts))
    )


def gated_narrow(gate_up: torch.Tensor, a: torch.Tensor, out: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    (tokens, ranks), columns = (len(gate_up), len(a)), gate_up.shape[1] // 2
    tuned, padded = GATED_NARROW, _padded(ranks)
    row_blocks = cdiv(tokens, tuned.rows)
    part_columns = _part(columns, tuned.block, row_blocks, tuned.programs, gate_up.device)
    parts = cdiv(columns, part_columns)
    sums = torch.empty(parts, tokens, ranks, device=gate_up.device, dtype=torch.float32)
    _gated_narrow_kernel[(row_blocks, parts)](
        described(gate_up, tuned.rows, tuned.block), described(a, padded, tuned.block), out, sums, tokens, columns, ranks,
        out.stride(0), part_columns,
        ROWS=tuned.rows, BLOCK=tuned.block, RANKS=padded, STAGES=tuned.stages, GELU=gelu, num_warps=tuned.warps,
    )  # fmt: skip
    return sums.sum(0).to(out.dtype)


def gated_backward_adapted_(
    gradient: torch.Tensor,
    gate_up_: torch.Tensor,
    of_down: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    scales: tuple[float, float],
    *,
    gelu: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    tokens, columns = gradient.shape
    narrow = (of_down, gate, up)
    ranks = [0 if part is None else part.shape[1] for part in narrow]
    tuned, padded = GATED_ADAPTED, _padded(max(ranks))
    column_blocks = cdiv(columns, tuned.block)
    part_tokens = _part(tokens, tuned.rows, column_blocks, tuned.programs, gate_up_.device)
    parts = cdiv(tokens, part_tokens)
    sums = torch.empty(parts, sum(ranks) * columns, device=gate_up_.device, dtype=torch.float32)
    values = described(gate_up_, tuned.rows, tuned.block)
    _gated_adapted_kernel[(column_blocks, parts)](
        values, described(gradient, tuned.rows, tuned.block),
        *(values if part is None else described(part, tuned.rows, padded) for part in narrow),
        gate_up_, sums, tokens, columns, *ranks, *scales, gate_up_.stride(0), part_tokens,
        DOWN=of_down is not None, GATE=gate is not None, UP=up is not None,
        ROWS=tuned.rows, BLOCK=tuned.block, RANKS=padded, STAGES=tuned.stages, GELU=gelu,
        num_warps=tuned.warps * (padded // _RANKS),
    )  # fmt: skip
    of_a, of_gate, of_up = torch.split(sums.sum(0), [columns * rank for rank in ranks])
    return (
        of_a.view(-1, columns) if ranks[0] else None,
        of_gate.view(columns, -1) if ranks[1] else None,
        of_up.view(columns, -1) if ranks[2] else None,
    )


def _part(whole: int, step: int, others: int, programs: int, device: torch.device) -> int:
    """How much of `whole` one program handles, a multiple of `step`.

    With `others` programs side by side, it gives about `programs` per multiprocessor, the number measured to be best.
    """
    wanted = programs * _multiprocessors(device)
    parts = max(1, min(round(wanted / others), whole // step))
    return step * -(-whole // (parts * step))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _padded(ranks: int) -> int:
    return _RANKS if ranks <= _RANKS else _LARGEST_RANK
