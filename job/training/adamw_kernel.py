"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for many parameters in one launch, with moments in float32.

Values decay after the step, as in bitsandbytes' CUDA kernels. Its CPU functions decay them before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from job.model.fused.launch import Kernel, cdiv

_BLOCK = 1024


_NUMBERS = tl.constexpr(5)  # numbers that describe a parameter


# parameters (count, 5) int64, per parameter: the addresses of value, gradient, mean and square, and the number of
# values. like, like_gradient: any tensors of the values' and the gradients' type. Writes means, squares and values.
# One program updates BLOCK values of the parameter with its number in the grid. A table of addresses lets one launch
# serve all parameters, since an adapter has hundreds of small ones. Bias corrections are folded into step_size and
# epsilon, as in bitsandbytes. shrunk is the factor of the weight decay.
@Kernel
@triton.jit
def _adamw_kernel(
    parameters, like, like_gradient, beta_mean, beta_square, epsilon, step_size, shrunk, BLOCK: tl.constexpr
):  # fmt: skip
    one = parameters + tl.program_id(1) * _NUMBERS
    count = tl.load(one + 4)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < count:
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        values = tl.load(one).to(like.dtype) + place
        means = tl.load(one + 2).to(tl.pointer_type(tl.float32)) + place
        squares = tl.load(one + 3).to(tl.pointer_type(tl.float32)) + place
        gradient = tl.load(tl.load(one + 1).to(like_gradient.dtype) + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(means, mask=inside, other=0.0) * beta_mean + (1 - beta_mean) * gradient
        square = tl.load(squares, mask=inside, other=0.0) * beta_square + (1 - beta_square) * gradient * gradient
        value = tl.load(values, mask=inside, other=0.0).to(tl.float32)
        value = (value + step_size * (mean / (tl.sqrt(square) + epsilon))) * shrunk
        tl.store(means, mean, mask=inside)
        tl.store(squares, square, mask=inside)
        tl.store(values, value.to(like.dtype.element_ty), mask=inside)


def adamw_(
    parameters: Sequence[Sequence[torch.Tensor]], number: int, rate: float, betas: tuple[float, float], epsilon: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """Take step `number`, counted from 1, in place.

    Each parameter is value, gradient, mean and square, all contiguous. Mean and square are float32. All values have one
    type, and so do all gradients.
    """
    described: list[int] = []
    for one in parameters:
        described += [*(part.data_ptr() for part in one), one[0].numel()]
    value, gradient = parameters[0][:2]
    addresses = torch.tensor(described, dtype=torch.int64)
    if value.is_cuda:  # the host need not wait for a copy from pinned memory
        addresses = addresses.pin_memory().to(value.device, non_blocking=True)
    mean_left, square_left = (1 - beta**number for beta in betas)
    correction = math.sqrt(square_left)
    _adamw_kernel[(cdiv(max(one[0].numel() for one in parameters), _BLOCK), len(parameters))](
        addresses, value, gradient, *betas, epsilon * correction, -rate * correction / mean_left, 1 - rate * weight_decay,
        BLOCK=_BLOCK,
    )  # fmt: skip
