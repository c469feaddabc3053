"""Launches of Triton kernels that cost the host little.

A step of a small batch is a few thousand kernels of some microseconds each, and the GPU waits for whoever launches them. At
each launch Triton asks anew for what it compiles by: types, alignments, special values, options, versions. That takes twice
as long as the launch itself. Here it is asked once for each kind of arguments, and what they are launched by is Python's own
arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNED = 16  # bytes, or a multiple of: what Triton compiles different code for, and what descriptors need
_INT32 = 2**31


class Kernel:
    """A function of `triton.jit`, launched as it is: `kernel[grid](*arguments, CONSTANT=…, num_warps=…)`."""

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
        # compiled[grid](…) would make ready for the hooks of Triton's profiler, which takes as long as the launch
        compiled.run(
            *(*grid, 1, 1)[:3], _stream(), compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants
        )  # fmt: skip


def _stream() -> int:
    """The handle of the current stream of the current GPU, as Triton asks for it."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def cdiv(whole: int, part: int) -> int:
    """How many parts cover the whole. Triton's own may be called in kernels as well, and takes microseconds."""
    return -(-whole // part)


def next_power_of_2(number: int) -> int:
    """The least that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def _kinds(arguments: Sequence[Any]) -> list[Any]:
    """What Triton may compile other code for on NVIDIA's cards; finer than it need be, never coarser. In one loop, since there are
    tens of thousands of arguments in a step."""
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
    """Whether tiles of it can be loaded by a descriptor, through Hopper's tensor memory accelerator."""
    size = matrix.element_size()
    return matrix.stride(1) == 1 and (matrix.stride(0) * size) % ALIGNED == 0 and matrix.data_ptr() % ALIGNED == 0


def described(matrix: torch.Tensor, *tile: int) -> TensorDescriptor:
    """A matrix from which a kernel loads tiles; what lies outside of it is zero."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(tile))
