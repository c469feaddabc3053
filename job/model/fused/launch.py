"""Cheap launches of Triton kernels.

A step of a small batch is a few thousand kernels of some microseconds each, and the GPU waits for the host to launch
them. At each launch Triton looks up everything that a compilation depends on: types, alignments, special values,
options, versions. That takes twice as long as the launch itself. Here the compiled kernel is looked up once per kind of
arguments, and the arithmetic around a launch is plain Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16  # bytes, or a multiple: Triton compiles other code for such addresses, and descriptors require them
_INT32 = 2**31


class Kernel:
    """A `triton.jit` function with cheaper launches. Calls look the same: `kernel[grid](*arguments, CONSTANT=…)`."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        kind = (*_kinds(arguments), *named.items())
        compiled = self._compiled.get(kind)
        if compiled is None:
            self._compiled[kind] = self._function[grid](*arguments, **named)  # None from Triton's interpreter
            return
        constants = [named[name] for name in self._function.arg_names[len(arguments) :]]
        # compiled[grid](…) would prepare the hooks of Triton's profiler, which takes as long as the launch
        compiled.run(
            *(*grid, 1, 1)[:3], _stream(), compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants
        )  # fmt: skip


def _stream() -> int:
    """The handle of the current GPU's current stream, obtained the way Triton does."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def cdiv(whole: int, part: int) -> int:
    """Division rounded up. Triton's own, which also works in kernels, takes microseconds."""
    return -(-whole // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least `number`, which must be positive."""
    return 1 << (number - 1).bit_length()


def _kinds(arguments: Sequence[Any]) -> list[Any]:
    """Everything in the arguments for which Triton may compile other code on NVIDIA's cards.

    It may distinguish more than Triton does, but never less. It is one loop, since a step has tens of thousands of
    arguments.
    """
    kinds: list[Any] = []
    for argument in arguments:
        of = type(argument)
        kinds.append(of)
        if of is int:
            kinds += "one" if argument == 1 else argument % ALIGNED == 0, -_INT32 <= argument < _INT32
        elif of is TensorDescriptor:
            kinds += argument.base.dtype, *argument.block_shape, argument.base.get_device()
        elif isinstance(argument, torch.Tensor):
            kinds += argument.dtype, argument.data_ptr() % ALIGNED == 0, argument.get_device()
        elif of is not float:
            kinds.append(argument)
    return kinds


def can_describe(matrix: torch.Tensor) -> bool:
    """Whether tiles of the matrix can be loaded by a descriptor, through Hopper's tensor memory accelerator (TMA)."""
    size = matrix.element_size()
    return matrix.stride(1) == 1 and (matrix.stride(0) * size) % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


def described(matrix: torch.Tensor, *tile: int) -> TensorDescriptor:
    """A descriptor from which a kernel loads tiles of `matrix`. Values outside of it read as zero."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))
