"""The Triton kernels give what their plain versions give. Without a GPU, Triton's own interpreter runs them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from job.model.fused import pointwise, triton_kernels

DTYPES = (torch.float32, torch.bfloat16)
ROWS, WIDTH = 5, 96


class Kernels:
    """The kernels of tensors on the CPU: interpreted there, or carried to the GPU and back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(triton_kernels, name)
        return kernel if os.environ.get("TRITON_INTERPRET") else functools.partial(_on_gpu, kernel)


def _on_gpu(kernel: Callable[..., Any], *arguments: Any) -> Any:
    carried = [part.cuda() if isinstance(part, torch.Tensor) else part for part in arguments]
    result = kernel(*carried)
    for part, there in zip(arguments, carried, strict=True):
        if isinstance(part, torch.Tensor):
            part.copy_(there)
    return (
        tuple(part.cpu() for part in result)
        if isinstance(result, tuple)
        else result.cpu()
        if result is not None
        else None
    )


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 1 / 64  # the interpreter cuts what a GPU rounds
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_write_only_the_columns_that_are_theirs(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = some(ROWS, WIDTH, dtype=dtype), some(WIDTH, dtype=dtype, seed=1)
    outs = [torch.full((ROWS, WIDTH + 8), 7.0, dtype=dtype) for _ in range(2)]
    pointwise.rms_norm(x, weight, 1e-5, outs[0])
    kernels.rms_norm(x, weight, 1e-5, outs[1])
    close(outs[1], outs[0])
    assert bool((outs[1][:, WIDTH:] == 7).all())
    gradient, residual = some(ROWS, WIDTH, dtype=dtype, seed=2), some(ROWS, WIDTH + 8, dtype=dtype, seed=3)
    pointwise.rms_norm_backward(gradient, x, weight, 1e-5, residual, outs[0])
    kernels.rms_norm_backward(gradient, x, weight, 1e-5, residual, outs[1])
    close(outs[1], outs[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [False, True])
def test_rotations_of_heads_within_a_wider_row(kernels: Kernels, dtype: torch.dtype, back: bool) -> None:
    heads = some(ROWS, 12 * 48, dtype=dtype)[:, 48 : 48 * 11].unflatten(
        1, (-1, 48)
    )  # 10 heads: more than one program's
    cos, sin = some(ROWS, 48, dtype=dtype, seed=1), some(ROWS, 48, dtype=dtype, seed=2)
    outs = [torch.zeros(ROWS, 10, 48, dtype=dtype) for _ in range(2)]
    pointwise.rotate(heads, cos, sin, outs[0], back=back)
    kernels.rotate(heads, cos, sin, outs[1], back)
    close(outs[1], outs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_and_its_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    width = 2100  # more than one program's
    gate_up = some(ROWS, 2 * width + 8, dtype=dtype)
    outs = [torch.zeros(ROWS, width + 4, dtype=dtype) for _ in range(2)]
    pointwise.gated(gate_up[:, : 2 * width], outs[0])
    kernels.gated(gate_up[:, : 2 * width], outs[1])
    close(outs[1], outs[0])
    gradient, copies = some(ROWS, width, dtype=dtype, seed=1), [gate_up.clone(), gate_up.clone()]
    again = pointwise.gated_backward_(gradient, copies[0][:, : 2 * width])
    close(kernels.gated_backward_(gradient, copies[1][:, : 2 * width]), again)
    close(copies[1], copies[0])


def test_the_plain_gradients_are_those_of_autograd() -> None:
    gate_up = some(ROWS, 64).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    gradient = some(ROWS, 32, seed=1)
    (wanted,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up * gradient).sum(), gate_up)
    found = gate_up.detach().clone()
    pointwise.gated_backward_(gradient, found)
    close(found, wanted)

    x, weight = some(ROWS, WIDTH).requires_grad_(), some(WIDTH, seed=1)
    above, residual = some(ROWS, WIDTH, seed=2), some(ROWS, WIDTH, seed=3)
    normed = torch.nn.functional.rms_norm(x, (WIDTH,), weight, 1e-5)
    (of_x,) = torch.autograd.grad((normed * above).sum(), x)
    out = torch.empty(ROWS, WIDTH)
    close(pointwise.rms_norm_backward(above, x.detach(), weight, 1e-5, residual, out), of_x + residual)


@pytest.mark.parametrize("strided", [False, True])
def test_dropout_drops_the_same_values_again_and_scales_the_others(kernels: Kernels, strided: bool) -> None:
    wide = some(200, 80)
    x = wide[:, :70] if strided else wide[:, :70].contiguous()
    for dropout in (kernels.dropout, pointwise.dropout):
        found = dropout(x, 0.25, 3)
        kept = found != 0
        close(found[kept], (x / 0.75)[kept])
        assert 0.22 < float((~kept).float().mean()) < 0.28
        assert torch.equal(found, dropout(x.contiguous(), 0.25, 3))
        assert not torch.equal(found, dropout(x, 0.25, 4))
        assert torch.equal(found[120:], dropout(x[120:], 0.25, 3, 120))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_labels_log_probability_and_its_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    logits, labels = some(ROWS, 5000, dtype=dtype), torch.tensor([0, 1, 4999, 7, 4096])
    logits[1, 1] = 20.0
    copies = [logits.clone(), logits.clone()]
    wanted = pointwise.label_log_probs_(copies[0], labels)
    found = kernels.label_log_probs_(copies[1], labels)
    for one, other in zip(found[:2], wanted[:2], strict=True):
        close(one, other)
    assert torch.equal(found[2], wanted[2])
    assert wanted[2].tolist() == [False, True, False, False, False]
    close(copies[1], copies[0])


def test_values_are_placed_and_scaled(kernels: Kernels) -> None:
    values, outs = some(300, 33), [torch.zeros(300, 40) for _ in range(2)]
    pointwise.place(values, outs[0][:, 3:36], 0.5)
    kernels.place(values, outs[1][:, 3:36], 0.5)
    assert torch.equal(outs[1], outs[0])


def test_rows_in_8_bits_are_at_most_one_rounding_away(kernels: Kernels) -> None:
    x = some(ROWS, WIDTH)
    values, scales = pointwise.quantize_rows(x)
    torch.testing.assert_close(values.float() * scales, x, rtol=1 / 16, atol=float(scales.max()) / 256)
    torch.testing.assert_close(scales, x.abs().amax(-1, keepdim=True) / 448)
    exact = values.float() * torch.tensor([[1.0], [2.0], [0.5], [0.25], [4.0]])  # the interpreter rounds wrongly
    for one, other in zip(kernels.quantize_rows(exact), pointwise.quantize_rows(exact), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_weights_become_the_very_values_that_bitsandbytes_makes(
    kernels: Kernels, kind: str, nested: bool
) -> None:
    weight = bnb.nn.Params4bit(some(64, 128), requires_grad=False, quant_type=kind, compress_statistics=nested).to(
        "cpu"
    )
    out = torch.zeros(64, 140)
    kernels.dequantize(weight, out[:, :128])
    assert torch.equal(out[:, :128], bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    assert not out[:, 128:].any()
