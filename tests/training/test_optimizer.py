"""One launch steps all parameters as bitsandbytes steps them one by one.

Without a GPU, Triton's interpreter runs the kernel.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from trl import SFTConfig

from job.settings import Settings
from job.training import adamw_kernel, optimizer, steps
from job.training.optimizer import AdamWAtOnce, Parameter, at_once
from job.training.trainer import AdapterTrainer

pytestmark = pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="tensors of these tests are on the CPU")
SHAPES = ((3, 700), (64,), (40, 40))
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "optim_bits": 32}


@pytest.fixture(autouse=True)
def decay_behind_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay after the step, as bitsandbytes' CUDA kernels do. Its CPU functions decay before it."""
    update = bnb.functional.optimizer_update_32bit
    signature = inspect.signature(update)

    def behind(*arguments: Any, **named: Any) -> None:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        every = bound.arguments
        rate, decay, every["weight_decay"] = every["lr"], every["weight_decay"], 0.0
        update(*bound.args, **bound.kwargs)
        every["p"].mul_(1 - rate * decay)

    monkeypatch.setattr(bnb.functional, "optimizer_update_32bit", behind)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each launch steps."""
    counts: list[int] = []
    take = adamw_kernel.adamw_

    def counted(parameters: list[Parameter], *step: Any) -> None:
        counts.append(len(parameters))
        take(parameters, *step)

    monkeypatch.setattr(adamw_kernel, "adamw_", counted)
    return counts


class Model:
    """Some parameters and their optimizer. The last parameters are not decayed."""

    def __init__(self, kind: type, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
        groups = [
            {"params": self.parameters[:2], "weight_decay": 0.5},
            {"params": self.parameters[2:], "weight_decay": 0.0},
        ]
        self.optimizer: Any = kind(groups, **SETTINGS)

    def step(self, number: int, without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(number)
        for index, parameter in enumerate(self.parameters):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = None if index == without else gradient
        self.optimizer.step()

    def assert_same(self, other: Model) -> None:
        for one, two in zip(self.parameters, other.parameters, strict=True):
            units = 0 if one.dtype == torch.float32 else 2**-7  # the interpreter truncates where a GPU rounds
            torch.testing.assert_close(one, two, rtol=1e-5 + units, atol=1e-6)
            for name in ("state1", "state2"):
                mine, theirs = self.optimizer.state[one][name], other.optimizer.state[two][name]
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
            assert self.optimizer.state[one]["step"] == other.optimizer.state[two]["step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_match_bitsandbytes_in_one_launch_per_group(launches: list[int], dtype: torch.dtype) -> None:
    ours, theirs = Model(AdamWAtOnce, dtype), Model(bnb.optim.AdamW, dtype)
    before = [parameter.detach().clone() for parameter in ours.parameters]
    for number in range(4):
        ours.step(number)
        theirs.step(number)
        if dtype == torch.bfloat16:  # compare each step alone, because rounding adds up
            ours.assert_same(theirs)
            for one, two in zip(ours.parameters, theirs.parameters, strict=True):
                two.data.copy_(one.data)
    ours.assert_same(theirs)
    assert all(not torch.equal(one, two) for one, two in zip(ours.parameters, before, strict=True))
    assert launches == [2, *[2, 1] * 4], "the comparison's two, and then one launch per group"


def test_a_checkpoint_can_move_from_one_to_the_other() -> None:
    ours, theirs = Model(AdamWAtOnce, torch.float32), Model(bnb.optim.AdamW, torch.float32)
    for number in range(2):
        ours.step(number)
    theirs.optimizer.load_state_dict(ours.optimizer.state_dict())
    for one, two in zip(ours.parameters, theirs.parameters, strict=True):
        two.data.copy_(one.data)
    for number in range(2, 4):
        ours.step(number)
        theirs.step(number)
    ours.assert_same(theirs)
    assert ours.optimizer.state[ours.parameters[0]]["step"] == 4


@pytest.mark.parametrize("broken", ["does nothing", "twice as far", "backwards", "crashes"])
def test_a_kernel_with_wrong_results_on_this_machine_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    take = adamw_kernel.adamw_

    def wrong(parameters: list[Parameter], number: int, rate: float, *step: Any) -> None:
        if broken == "crashes":
            raise RuntimeError("no kernel image is available")
        if broken != "does nothing":
            take(parameters, number, {"twice as far": 2, "backwards": -1}[broken] * rate, *step)

    monkeypatch.setattr(adamw_kernel, "adamw_", wrong)
    ours, theirs = Model(AdamWAtOnce, torch.float32), Model(bnb.optim.AdamW, torch.float32)
    for model in (ours, theirs):  # as in the first step of a training, where nothing shows that it is wrong
        for group in model.optimizer.param_groups:
            group["lr"] = 0.0
        model.step(0)
        for group in model.optimizer.param_groups:
            group["lr"] = 0.01
    for number in range(1, 4):
        ours.step(number)
        theirs.step(number)
    ours.assert_same(theirs)
    assert all(torch.equal(one, two) for one, two in zip(ours.parameters, theirs.parameters, strict=True))
    told = capsys.readouterr().out
    assert told.count("one parameter at a time") == 1
    assert ("no kernel image" if broken == "crashes" else "gave wrong values") in told


def test_parameters_that_are_not_alike_are_left_to_bitsandbytes(launches: list[int]) -> None:
    ours, theirs = Model(AdamWAtOnce, torch.float32), Model(bnb.optim.AdamW, torch.float32)
    for number, without in enumerate([1, None, None]):  # the second parameter has taken fewer steps than the first
        ours.step(number, without)
        theirs.step(number, without)
    ours.assert_same(theirs)
    assert launches == [2, 1, 1], "the comparison's two, and the first step's groups"


def test_the_default_optimizer_is_supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizer, "can_compile_kernels", lambda: True)
    monkeypatch.setattr(steps, "at_once", lambda kind, named, device: at_once(kind, named, torch.device("cuda", 0)))
    arguments = SFTConfig(str(tmp_path), optim=Settings().optim, use_cpu=True, bf16=False)
    kind, named = AdapterTrainer.get_optimizer_cls_and_kwargs(arguments)
    assert kind is AdamWAtOnce
    assert named["is_paged"]


def test_parameters_of_two_gpus_and_moments_in_8_bits_are_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(AdamWAtOnce, torch.float32)
    model.step(0)
    state = model.optimizer.state[model.parameters[0]]
    for parameter in model.parameters:
        parameter.grad = torch.ones_like(parameter)
    assert model.optimizer._groups() is not None
    state["state1"], moments = state["state1"].to(torch.uint8), state["state1"]
    assert model.optimizer._groups() is None
    state["state1"] = moments
    elsewhere = torch.nn.Parameter(torch.empty(3, device="meta"))
    elsewhere.grad = torch.empty_like(elsewhere)
    model.optimizer.param_groups[0]["params"].append(elsewhere)
    moment = torch.empty(3, device="meta")
    model.optimizer.state[elsewhere] = {"step": 1, "state1": moment, "state2": moment}
    assert model.optimizer._groups() is None


def test_it_supports_adamw_with_moments_in_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "can_compile_kernels", lambda: True)
    gpu, moments = torch.device("cuda", 0), {"optim_bits": 32, "is_paged": True}
    assert at_once(bnb.optim.AdamW, moments, gpu) is AdamWAtOnce
    assert at_once(bnb.optim.AdamW, {**moments, "optim_bits": 8}, gpu) is bnb.optim.AdamW
    assert at_once(bnb.optim.AdamW, moments, torch.device("cpu")) is bnb.optim.AdamW
    assert at_once(torch.optim.AdamW, {}, gpu) is torch.optim.AdamW
    monkeypatch.setattr(optimizer, "can_compile_kernels", lambda: False)
    assert at_once(bnb.optim.AdamW, moments, gpu) is bnb.optim.AdamW


def test_decay_alone_shrinks_an_adapter_as_adamw_says() -> None:
    """The default rate and decay take 2e-7 of a value per step. In bfloat16, with its 8 bits, that is nothing."""
    value, rate, decay, steps = torch.full((64,), 0.5), 2e-4, 0.001, 200
    one = Parameter(value, torch.zeros_like(value), torch.zeros(64), torch.zeros(64))
    for number in range(1, steps + 1):
        adamw_kernel.adamw_([one], number, rate, (0.9, 0.999), 1e-8, decay)
    wanted = 0.5 * (1 - rate * decay) ** steps
    torch.testing.assert_close(value, torch.full((64,), wanted), rtol=0.0, atol=4e-6)
    assert bool((value < 0.5 - 1e-5).all())
    assert float(torch.tensor(0.5).bfloat16() * (1 - rate * decay)) == 0.5
