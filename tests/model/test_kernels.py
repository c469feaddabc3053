"""The Triton kernels give what their plain versions give. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import triton
from triton.compiler.compiler import CompiledKernel

from job.model.fused import gate_kernels, launch, pointwise, triton_kernels
from job.model.fused.launch import Kernel, cdiv, next_power_of_2
from job.model.fused.rounding import Rounded

DTYPES = (torch.float32, torch.bfloat16)
MULTIPLIED = (torch.float32, torch.float16)  # the interpreter cannot multiply matrices in bfloat16
ROWS, WIDTH = 5, 96


class Kernels:
    """The kernels for tensors on the CPU: interpreted there, or run on the GPU and copied back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        module = gate_kernels if name.startswith("gated") else triton_kernels
        kernel: Callable[..., Any] = getattr(module, name)
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
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 1 / 64  # the interpreter truncates where a GPU rounds
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def close_sums(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Like `close`, for sums over many values, whose rounding is that of the largest."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    tolerance = 1e-5 if wanted.dtype == torch.float32 else 1 / 64
    assert float((found.float() - wanted.float()).norm() / wanted.float().norm()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_write_only_their_own_columns(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight = some(ROWS, WIDTH, dtype=dtype), some(WIDTH, dtype=dtype, seed=1)
    outs = [torch.full((ROWS, WIDTH + 8), 7.0, dtype=dtype) for _ in range(2)]
    inverses = [norm.rms_norm_(x, weight, 1e-5, out) for norm, out in zip((pointwise, kernels), outs, strict=True)]
    close(outs[1], outs[0])
    close(inverses[1], inverses[0])
    close(inverses[0], x.float().square().mean(-1, keepdim=True).add(1e-5).rsqrt())
    assert bool((outs[1][:, WIDTH:] == 7).all())
    gradient, residual = some(ROWS, WIDTH, dtype=dtype, seed=2), some(ROWS, WIDTH + 8, dtype=dtype, seed=3)
    pointwise.rms_norm_backward(gradient, x, weight, 1e-5, residual, outs[0])
    kernels.rms_norm_backward(gradient, x, weight, 1e-5, residual, outs[1])
    close(outs[1], outs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_before_a_norm_is_kept_and_rounded(kernels: Kernels, dtype: torch.dtype) -> None:
    x, add, weight = some(ROWS, WIDTH, dtype=dtype), some(ROWS, WIDTH, dtype=dtype, seed=1), some(WIDTH, dtype=dtype)
    both, wanted = x + add, torch.empty_like(x)
    pointwise.rms_norm_(both, weight, 1e-5, wanted)
    for norm in (pointwise, kernels):
        found, out = x.clone(), torch.empty_like(x)
        norm.rms_norm_(found, weight, 1e-5, out, None, add)
        close(found, both)
        close(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_of_heads_within_a_wider_row(kernels: Kernels, dtype: torch.dtype) -> None:
    heads = some(ROWS, 12 * 48, dtype=dtype)[:, 48 : 48 * 11].unflatten(
        1, (-1, 48)
    )  # 10 heads: more than one program handles
    cos, sin = some(ROWS, 48, dtype=dtype, seed=1), some(ROWS, 48, dtype=dtype, seed=2)
    outs = [torch.zeros(ROWS, 10, 48, dtype=dtype) for _ in range(2)]
    pointwise.rotate(heads, cos, sin, outs[0])
    kernels.rotate(heads, cos, sin, outs[1])
    close(outs[1], outs[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared"), [(10, 10), (6, 2)])
def test_the_gradients_of_heads_are_rotated_back_into_one_row(
    kernels: Kernels, dtype: torch.dtype, heads: int, shared: int
) -> None:
    of_heads = [some(ROWS, count, 24, dtype=dtype, seed=count) for count in (heads, shared, shared)]
    angles = some(ROWS, 12, seed=3).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    width = (heads + 2 * shared) * 24
    outs = [torch.full((ROWS, width + 8), 7.0, dtype=dtype) for _ in range(2)]
    pointwise.rotate_back(*of_heads, cos, sin, outs[0])
    kernels.rotate_back(*of_heads, cos, sin, outs[1])
    close(outs[1], outs[0])
    assert bool((outs[1][:, width:] == 7).all())
    assert torch.equal(outs[1][:, (heads + shared) * 24 : width], of_heads[2].flatten(1))
    if dtype == torch.float32:  # a forward rotation undoes it
        again = torch.empty_like(of_heads[0])
        pointwise.rotate(outs[0][:, : heads * 24].unflatten(1, (-1, 24)), cos, sin, again)
        close(again, of_heads[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_and_its_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    width = 2100  # more than one program handles
    gate_up = some(ROWS, 2 * width + 8, dtype=dtype)
    outs = [torch.zeros(ROWS, width + 4, dtype=dtype) for _ in range(2)]
    pointwise.gated(gate_up[:, : 2 * width], outs[0])
    kernels.gated(gate_up[:, : 2 * width], outs[1])
    close(outs[1], outs[0])
    gradient, copies = some(ROWS, width, dtype=dtype, seed=1), [gate_up.clone(), gate_up.clone()]
    again = pointwise.gated_backward_(gradient, copies[0][:, : 2 * width])
    close(kernels.gated_backward_(gradient, copies[1][:, : 2 * width]), again)
    close(copies[1], copies[0])


# rows and columns that do not fill a tile, and several parts of each
@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("ranks", [4, 16])
def test_the_gate_with_the_narrow_product_of_its_result(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ranks: int
) -> None:
    monkeypatch.setattr(gate_kernels, "_multiprocessors", lambda device: 1)
    tokens, width = 70, 200
    gate_up, a = (
        some(tokens, 2 * width + 8, dtype=dtype).to(_device()),
        some(ranks, width + 8, dtype=dtype).to(_device()),
    )
    outs = [torch.full((tokens, width + 4), 7.0, dtype=dtype, device=_device()) for _ in range(2)]
    narrow = [
        way(gate_up[:, : 2 * width], a[:, :width], out)
        for way, out in zip((pointwise.gated_narrow, gate_kernels.gated_narrow), outs, strict=True)
    ]
    close(outs[1], outs[0])
    assert bool((outs[1][:, width:] == 7).all())
    close_sums(narrow[1], narrow[0])


BESIDE = [(4, 4, 4), (16, 0, 8), (0, 4, 0), (0, 0, 0)]  # ranks of down, gate and up


@pytest.mark.parametrize("dtype", MULTIPLIED)
@pytest.mark.parametrize("ranks", BESIDE)
def test_the_gates_gradients_with_those_of_the_adapters_around_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ranks: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(gate_kernels, "_multiprocessors", lambda device: 3)
    tokens, width = 70, 104
    gradient = some(tokens, width, dtype=dtype, seed=1).to(_device())
    of_down = some(tokens, 40, dtype=dtype, seed=2).to(_device())[:, 8 : 8 + ranks[0]] if ranks[0] else None
    wide = some(tokens, 40, dtype=dtype, seed=3).to(_device())
    gate, up = (wide[:, begin : begin + rank] if rank else None for begin, rank in ((0, ranks[1]), (16, ranks[2])))
    beside = pointwise.Beside(of_down, gate, up, (0.5, 2.0))
    copies = [some(tokens, 2 * width + 8, dtype=dtype).to(_device()) for _ in range(3)]
    halves = [copy[:, : 2 * width] for copy in copies]
    act = pointwise.gated_backward_(gradient, halves[2])
    wanted = pointwise.gated_backward_adapted_(gradient, halves[0], beside)
    found = gate_kernels.gated_backward_adapted_(gradient, halves[1], *beside)
    close(copies[1], copies[0])
    by_hand = [
        None if left is None or right is None else left.float().T @ right.float() * scale
        for left, right, scale in ((of_down, act, 1), (halves[2][:, :width], gate, 0.5), (halves[2][:, width:], up, 2))
    ]
    for one, other, exact in zip(found, wanted, by_hand, strict=True):
        assert (one is None) == (other is None) == (exact is None)
        if one is not None and other is not None and exact is not None:
            close_sums(one, exact)
            close_sums(other, exact)


def test_the_gates_kernels_support_many_tokens_of_aligned_tensors_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    def tensor(rows: int, columns: int, stride: int) -> torch.Tensor:
        return torch.empty(rows, stride, dtype=torch.bfloat16, device="meta")[:, :columns]

    many = gate_kernels.MANY_TOKENS
    gate_up, a, narrow = tensor(many, 22016, 22144), tensor(64, 11008, 11072), tensor(many, 64, 128)
    assert not gate_kernels.serves([gate_up], [a]), "this is not a GPU"
    monkeypatch.setattr(gate_kernels, "is_hopper", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)
    assert gate_kernels.serves([gate_up], [a])
    assert gate_kernels.serves([gate_up, tensor(many, 11008, 11008)], [None, narrow, narrow])
    assert gate_kernels.serves([gate_up], [tensor(128, 11008, 11072)])
    for refused in (tensor(256, 11008, 11008), tensor(many, 256, 256), tensor(many, 4, 12), narrow.T):
        assert not gate_kernels.serves([gate_up], [refused]), (refused.shape, refused.stride())
    assert not gate_kernels.serves([gate_up, tensor(many, 1004, 1004)], [a])
    assert not gate_kernels.serves([gate_up[: many - 1]], [a])
    assert not gate_kernels.serves([gate_up.float()], [a])


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
    wide = some(40, 80)
    x = wide[:, :70] if strided else wide[:, :70].contiguous()
    for dropout in (kernels.dropout_, pointwise.dropout_):
        found = dropout(x, 0.25, 3)
        kept = found != 0
        close(found[kept], (x / 0.75)[kept])
        assert 0.22 < float((~kept).float().mean()) < 0.28
        assert torch.equal(found, dropout(x.contiguous(), 0.25, 3))
        assert not torch.equal(found, dropout(x, 0.25, 4))
        assert torch.equal(found[24:], dropout(x[24:], 0.25, 3, 24))


def test_a_moment_is_added_to_seed_and_place_of_dropout(kernels: Kernels) -> None:
    x = torch.randn(8, 200)
    for dropout in (kernels.dropout_, pointwise.dropout_):
        found = dropout(x, 0.25, 2**20, 4, torch.tensor([2**30, 20]))
        assert torch.equal(found, dropout(x, 0.25, 2**30 + 2**20, 24))
        assert not torch.equal(found, dropout(x, 0.25, 2**20, 4))


def test_dropout_draws_independently_for_each_value(kernels: Kernels) -> None:
    kept = (kernels.dropout_(torch.ones(3, 2 * 4096 + 100), 0.5, 3) != 0).double()
    drawn = [row[begin : begin + 100] for row in kept for begin in range(0, kept.shape[1], 1024)]
    assert len(drawn) == 27
    alike = [float((one == other).double().mean()) for one, other in itertools.combinations(drawn, 2)]
    assert min(alike) > 0.25 and max(alike) < 0.75, "two rows of a hundred coins agree in half of them"


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


def test_values_are_placed_among_others(kernels: Kernels) -> None:
    values, out = some(300, 33), torch.zeros(300, 40)
    kernels.place(values, out[:, 3:36])
    assert torch.equal(out[:, 3:36], values)
    assert not out[:, :3].any() and not out[:, 36:].any()


def test_many_values_are_placed_and_scaled_in_one_launch() -> None:
    values = [some(9, 300), some(700, 4, seed=1)]
    outs = [torch.zeros(709, 310, device=_device(), dtype=torch.bfloat16) for _ in range(2)]
    for place_all, out in zip((pointwise.place_all, triton_kernels.place_all), outs, strict=True):
        places = [out[700:, :300], out[:700, 306:]]
        place_all([value.to(out.device) for value in values], places, [1.0, 0.25])
    assert outs[0].abs().sum() > 0
    close(outs[1].cpu(), outs[0].cpu())


def test_dropout_can_be_added_to_existing_values(kernels: Kernels) -> None:
    x, sums = some(20, 70), some(20, 70, seed=1)
    for dropout in (kernels.dropout_, pointwise.dropout_):
        added = sums.clone()
        dropout(x, 0.25, 3, add_to_=added)
        close(added, sums + dropout(x, 0.25, 3))


def _device() -> str:
    return "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


def _rounds(out: torch.Tensor, rounded: Rounded) -> None:
    """`rounded` is `out` to within one step of e4m3.

    Where a value should be rounded up to a power of two, the interpreter gives half of it.
    """
    wide = out.float().cpu()
    torch.testing.assert_close(rounded.scales.cpu(), wide.abs().amax(-1, keepdim=True) / 448)
    found = rounded.values.float().cpu() * rounded.scales.cpu()
    near = torch.isclose(found, wide, rtol=1 / 8, atol=float(rounded.scales.max()) / 256)
    assert float(near.float().mean()) > (0.95 if os.environ.get("TRITON_INTERPRET") else 0.9999)


@pytest.mark.parametrize("kernel", [True, False])
def test_results_in_8_bits_alongside_those_in_16(kernel: bool) -> None:
    functions: Any = triton_kernels if kernel else pointwise
    gates: Any = gate_kernels if kernel else pointwise
    device = _device() if kernel else "cpu"
    x, weight, gradient = (some(ROWS, WIDTH, dtype=torch.bfloat16, seed=seed).to(device) for seed in range(3))
    normed, rounded = torch.empty_like(x), Rounded.empty(x, WIDTH)
    functions.rms_norm_(x, weight[0], 1e-5, normed, rounded)
    _rounds(normed, rounded)
    alone = torch.empty_like(x)
    functions.rms_norm_(x, weight[0], 1e-5, alone)
    assert torch.equal(normed, alone)
    _rounds(functions.rms_norm_backward(gradient, x, weight[0], 1e-5, x, normed, rounded), rounded)

    width = 2100  # more than one iteration of the kernel's loops
    gate_up, of_act = (some(ROWS, count, dtype=torch.bfloat16).to(device) for count in (2 * width, width))
    gate_up[:, width - 1] = gate_up[:, -1] = of_act[:, -1] = 9.0  # the largest comes last
    act, rounded = torch.empty_like(of_act), Rounded.empty(x, width)
    _rounds(gates.gated(gate_up, act, rounded), rounded)
    close(act, gates.gated(gate_up, torch.empty_like(act)))
    alone, rounded = gate_up.clone(), Rounded.empty(x, 2 * width)
    close(gates.gated_backward_(of_act, gate_up, rounded), gates.gated_backward_(of_act, alone))
    _rounds(gate_up, rounded)
    close(gate_up, alone)


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
def test_4_bit_weights_dequantize_to_exactly_the_values_of_bitsandbytes(kind: str, nested: bool) -> None:
    weights = [
        bnb.nn.Params4bit(some(rows, 512, seed=rows), requires_grad=False, quant_type=kind, compress_statistics=nested)
        .to(_device())
        for rows in (64, 160)
    ]  # fmt: skip
    out = torch.zeros(224, 520, device=_device())
    triton_kernels.dequantize(weights, [out[:64, :512], out[64:, :512]])
    wanted = torch.cat([bnb.functional.dequantize_4bit(weight.data, weight.quant_state) for weight in weights])
    assert torch.equal(out[:, :512], wanted)
    assert not out[:, 512:].any()


class Compiled:
    """Stands in for a kernel that Triton compiled, and records what it is launched with."""

    function, packed_metadata = 11, "metadata"

    def __init__(self, launched: list[Any]) -> None:
        self._launched = launched

    def run(self, *arguments: Any) -> None:
        self._launched.append(arguments)

    def launch_metadata(self, *arguments: Any) -> str:
        return "for a hook"

    def _init_handles(self) -> None:
        pass


class Compiler:
    """Stands in for what `Kernel` uses of `triton.jit`, and records what is compiled and launched."""

    arg_names = ("x", "columns", "scale", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.compiled.append((grid, arguments, named))
            return Compiled(self.launched)

        return launch


def test_a_kernel_is_looked_up_once_per_kind_of_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_stream", lambda: 7)
    compiler = Compiler()
    kernel, x = Kernel(compiler), torch.zeros(64)
    kernel[(3,)](x, 32, 0.5, BLOCK=8, num_warps=4)
    kernel[(4, 2)](x[4:], 48, 0.25, BLOCK=8, num_warps=4)
    assert len(compiler.compiled) == 1
    ((*_, same, columns, scale, block),) = compiler.launched
    assert (columns, scale, block) == (48, 0.25, 8)
    assert same.data_ptr() == x[4:].data_ptr()
    by_triton: list[Any] = []
    CompiledKernel.__getitem__(Compiled(by_triton), (4, 2, 1))(same, columns, scale, block, stream=7)
    hooks = slice(6, 9)
    assert compiler.launched[0][hooks] == (None, None, None)
    assert by_triton[0][hooks][0] == "for a hook", "Triton launches with other arguments"
    for parts in (slice(hooks.start), slice(hooks.stop, None)):
        assert compiler.launched[0][parts] == by_triton[0][parts]
    others = [
        ((x[1:], 32, 0.5), 8, 4), ((x.double(), 32, 0.5), 8, 4), ((x, 33, 0.5), 8, 4), ((x, 1, 0.5), 8, 4),
        ((x, 2**40, 0.5), 8, 4), ((x, 32, 0.5), 16, 4), ((x, 32, 0.5), 8, 8),
    ]  # fmt: skip
    for arguments, block, warps in others:
        kernel[(3,)](*arguments, BLOCK=block, num_warps=warps)
    assert len(compiler.compiled) == 1 + len(others)
    assert len(compiler.launched) == 1


def test_grids_are_counted_as_triton_counts_them() -> None:
    for number in range(1, 70):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        assert [cdiv(number, part) for part in (1, 3, 64)] == [triton.cdiv(number, part) for part in (1, 3, 64)]
