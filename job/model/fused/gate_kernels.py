"""The kernels of the gate, silu(gate) · up, and of what its adapters multiply.

The gate's values are the widest of a layer: each pass over them costs as much as several elsewhere. So the adapters' narrow
products, which need the same values, are computed while these are at hand, each by one program in one order: the same
numbers again for the same input. Rows are tokens.
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
_LARGEST_RANK = 128  # whose sums a program's registers hold


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # which knows no instructions of a GPU's
_RANKS = 64  # of the smallest matrix instruction; smaller ones are filled up with zeros


class Tuned(NamedTuple):
    """Rows and columns of a tile, warps, loads ahead, and about how many programs there are to a multiprocessor."""

    rows: int
    block: int
    warps: int
    stages: int
    programs: int


# found on an H200 among some ten of each, for a 7B's gate: BENCHMARKS.md
GATED_NARROW, GATED_ADAPTED = Tuned(64, 128, 4, 2, 4), Tuned(32, 128, 8, 3, 2)


@triton.jit
def _sigmoid(x):
    """In four instructions, within two units in the last place of float32; Triton's own takes three times as many."""
    if _INTERPRETED:
        return tl.sigmoid(x)
    else:  # noqa: RET505 - of the two, Triton compiles one
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",  # 1 / (1 + 2 ** (-x log2 e))
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _opened(gate, kind):
    """silu(gate), rounded where the plain version rounds."""
    return (gate * _sigmoid(gate)).to(kind).to(tl.float32)


@triton.jit
def _gradients(gate, up, given, kind):
    """silu(gate) · up, and its gradient with regard to both."""
    sigmoid = _sigmoid(gate)
    opened = gate * sigmoid
    act = (opened.to(kind).to(tl.float32) * up).to(kind)
    return act, (given * up * (sigmoid + opened * (1 - sigmoid))).to(kind), (given * opened).to(kind)


@Kernel
@triton.jit
def _gated_kernel(gate_up, out, columns, gate_stride, out_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gate = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_stride + columns + offsets, mask=inside, other=0.0)
    kind = gate.dtype
    act = (_opened(gate.to(tl.float32), kind) * up.to(tl.float32)).to(kind)
    tl.store(out + row * out_stride + offsets, act, mask=inside)


@Kernel
@triton.jit
def _gated_backward_kernel(gradient, gate_up, out, columns, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    gates, ups = gate_up + row * gate_stride + offsets, gate_up + row * gate_stride + columns + offsets
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * columns + offsets, mask=inside, other=0.0).to(tl.float32)
    act, of_gate, of_up = _gradients(gate, up, given, gate_up.dtype.element_ty)
    tl.store(out + row * columns + offsets, act, mask=inside)
    tl.store(gates, of_gate, mask=inside)
    tl.store(ups, of_up, mask=inside)


@Kernel
@triton.jit
def _gated_rounded_kernel(gate_up, out, rounded, scales, columns, gate_stride, out_stride, BLOCK: tl.constexpr):
    """A whole row by one program: its scale is known at its end, and what was written is read again while it is in the
    cache."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 0.0, tl.float32)
    for begin in range(0, columns, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        inside = offsets < columns
        gate = tl.load(gate_up + row * gate_stride + offsets, mask=inside, other=0.0)
        up = tl.load(gate_up + row * gate_stride + columns + offsets, mask=inside, other=0.0)
        kind = gate.dtype
        act = (_opened(gate.to(tl.float32), kind) * up.to(tl.float32)).to(kind)
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


@Kernel
@triton.jit
def _gated_backward_rounded_kernel(
    gradient, gate_up, out, rounded, scales, columns, gate_stride, BLOCK: tl.constexpr
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
        act, of_gate, of_up = _gradients(gate, up, given, gate_up.dtype.element_ty)
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


# The two below load tiles by descriptors (TMA), which fill with zeros what lies outside of a tensor. Their narrow products
# have the gate's values on the right, so that these are computed once, in the order in which they are stored.


@Kernel
@triton.jit
def _gated_narrow_kernel(
    gate_up, a, out, sums, tokens, columns, ranks, out_stride, part_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Some rows and a part of the columns: the gate's values, and the sums of their products with A over that part."""
    first, begin = tl.program_id(0) * ROWS, tl.program_id(1) * part_columns
    rows = tl.arange(0, ROWS)
    present = rows < tokens - first
    outs = out + tl.cast(first, tl.int64) * out_stride + rows[:, None] * out_stride
    total = tl.zeros((RANKS, ROWS), tl.float32)
    for at in tl.range(begin, tl.minimum(begin + part_columns, columns), BLOCK, num_stages=STAGES):
        gate, up = gate_up.load([first, at]), gate_up.load([first, columns + at])
        kind = gate.dtype
        act = (_opened(gate.to(tl.float32), kind) * up.to(tl.float32)).to(kind)
        offsets = at + tl.arange(0, BLOCK)
        tl.store(outs + offsets[None, :], act, mask=present[:, None] & (offsets < columns)[None, :])
        total = tl.dot(a.load([0, at]), tl.trans(act), total, input_precision="ieee")
    rank = tl.arange(0, RANKS)
    to = sums + (tl.cast(tl.program_id(1), tl.int64) * tokens + first + rows[:, None]) * ranks + rank[None, :]
    tl.store(to, tl.trans(total), mask=present[:, None] & (rank < ranks)[None, :])


@Kernel
@triton.jit
def _gated_adapted_kernel(
    gate_up, gradient, of_down, narrow_gate, narrow_up, out, sums, tokens, columns, down_ranks, gate_ranks, up_ranks,
    gate_scale, up_scale, out_stride, part_tokens,
    DOWN: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    RANKS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """Some columns and a part of the rows: the gate's gradients, and the sums over that part for the adapters' gradients."""
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
        act, of_gate, of_up = _gradients(gate, up, given, out.dtype.element_ty)
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
    # one behind the other: A's (down_ranks, columns), the gate's B (columns, gate_ranks), the other B (columns, up_ranks)
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


def gated(gate_up: torch.Tensor, out: torch.Tensor, rounded: Rounded | None = None) -> torch.Tensor:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    strides = gate_up.stride(0), out.stride(0)
    if rounded is not None:
        _gated_rounded_kernel[(rows,)](gate_up, out, *rounded, columns, *strides, BLOCK=_BLOCK)
        return out
    _gated_kernel[(rows, cdiv(columns, _BLOCK))](gate_up, out, columns, *strides, BLOCK=_BLOCK)
    return out


def gated_backward_(gradient: torch.Tensor, gate_up_: torch.Tensor, rounded: Rounded | None = None) -> torch.Tensor:
    rows, columns = gradient.shape
    out = torch.empty_like(gradient)
    if rounded is not None:
        _gated_backward_rounded_kernel[(rows,)](
            gradient, gate_up_, out, *rounded, columns, gate_up_.stride(0), BLOCK=_BLOCK
        )
        return out
    grid = (rows, cdiv(columns, _BLOCK))
    _gated_backward_kernel[grid](gradient, gate_up_, out, columns, gate_up_.stride(0), BLOCK=_BLOCK)
    return out


def serves(values: Sequence[torch.Tensor], narrow: Sequence[torch.Tensor | None]) -> bool:
    """Whether the two below are known to be the faster way, on Hopper, in 16 bits, for so many tokens that the host has time for
    descriptors; and can load these values of the gate and these narrow matrices of ranks."""
    parts = [part for part in narrow if part is not None]
    return (
        is_hopper(values[0].device)
        and values[0].element_size() == 2
        and len(values[0]) >= MANY_TOKENS
        and all(min(part.shape) <= _LARGEST_RANK for part in parts)
        and all(can_describe(part) for part in (*values, *parts))
    )


def gated_narrow(gate_up: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    (tokens, ranks), columns = (len(gate_up), len(a)), gate_up.shape[1] // 2
    tuned, padded = GATED_NARROW, _padded(ranks)
    row_blocks = cdiv(tokens, tuned.rows)
    part_columns = _part(columns, tuned.block, row_blocks, tuned.programs, gate_up.device)
    parts = cdiv(columns, part_columns)
    sums = torch.empty(parts, tokens, ranks, device=gate_up.device, dtype=torch.float32)
    _gated_narrow_kernel[(row_blocks, parts)](
        described(gate_up, tuned.rows, tuned.block), described(a, padded, tuned.block), out, sums, tokens, columns, ranks,
        out.stride(0), part_columns,
        ROWS=tuned.rows, BLOCK=tuned.block, RANKS=padded, STAGES=tuned.stages, num_warps=tuned.warps,
    )  # fmt: skip
    return sums.sum(0).to(out.dtype)


def gated_backward_adapted_(
    gradient: torch.Tensor,
    gate_up_: torch.Tensor,
    of_down: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    scales: tuple[float, float],
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
        ROWS=tuned.rows, BLOCK=tuned.block, RANKS=padded, STAGES=tuned.stages,
        num_warps=tuned.warps * (padded // _RANKS),
    )  # fmt: skip
    of_a, of_gate, of_up = torch.split(sums.sum(0).to(gate_up_.dtype), [columns * rank for rank in ranks])
    return (
        of_a.view(-1, columns) if ranks[0] else None,
        of_gate.view(columns, -1) if ranks[1] else None,
        of_up.view(columns, -1) if ranks[2] else None,
    )


def _part(whole: int, step: int, others: int, programs: int, device: torch.device) -> int:
    """How much of `whole` one program passes over, in steps, so that with `others` side by side there are about as many
    `programs` to a multiprocessor as were measured to be best."""
    wanted = programs * _multiprocessors(device)
    parts = max(1, min(round(wanted / others), whole // step))
    return step * -(-whole // (parts * step))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _padded(ranks: int) -> int:
    return _RANKS if ranks <= _RANKS else _LARGEST_RANK
