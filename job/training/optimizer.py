"""bitsandbytes' AdamW with moments in float32, updating all parameters in one launch.

bitsandbytes updates one parameter after another and waits for the GPU at each. For the 448 matrices of a 7B's adapter
that takes some tens of milliseconds in which the GPU is nearly idle. The moments remain bitsandbytes' own, paged or
not, and checkpoints stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch

from job.errors import KernelsFault, in_a_line
from job.model.device import can_compile_kernels, is_alive
from job.report.events import message
from job.training.ranks import is_so_everywhere

_SCARCE = 2**30  # free bytes of the GPU below which CUDA may have moved paged moments to the host


class Parameter(NamedTuple):
    """A parameter, its gradient and its moments, all contiguous. The moments are float32 and reachable by the GPU."""

    value: torch.Tensor
    gradient: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor


class Step(NamedTuple):
    """What all parameters of a step have in common. `number` counts from 1."""

    number: int
    rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float


def at_once(kind: type, named: Mapping[str, Any], device: torch.device) -> type:
    """The class to use for an optimizer of `kind` with these arguments: `AdamWAtOnce` if it applies, else `kind`."""
    serves = (
        kind is bnb.optim.AdamW and named.get("optim_bits") == 32 and device.type == "cuda" and can_compile_kernels()
    )
    return AdamWAtOnce if serves else kind


class AdamWAtOnce(bnb.optim.AdamW):
    """bitsandbytes' AdamW in one launch per step.

    Before the first step, a test step is taken both ways. If the results differ or the kernel fails, bitsandbytes takes
    all steps.
    """

    initialized: bool
    _compares, _fails = True, False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = None if closure is not None or self._fails else self._groups()
        if groups is None:
            return super().step(closure)
        if groups and self._compares:
            like = groups[0][0][0]  # all processes must take the same steps
            self._compares, self._fails = False, not is_so_everywhere(_agrees(like), like.value.device)
            if self._fails:
                return super().step()
        for parameters, step in groups:
            _take(parameters, step)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
        return None

    def state_dict(self) -> dict[str, Any]:
        """The state, after waiting for the GPU: the host reads paged moments, so the GPU must have written them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found: dict[str, Any] = super().state_dict()
        return found

    def _groups(self) -> list[tuple[list[Parameter], Step]] | None:
        """Each group's parameters and their common step. None if they are not alike or some have their own settings."""
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if self.mng.index2config or self.mng.pid2config or self.args.max_unorm > 0 or self.args.skip_zeros:
            return None
        scarce = self.is_paged and _free_bytes() < _SCARCE
        found = []
        for group_index, group in enumerate(self.param_groups):
            parameters, steps = [], set()
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                if scarce:
                    self.prefetch_state(parameter)
                state = self.state[parameter]
                steps.add(state["step"])
                parameters.append(Parameter(parameter, parameter.grad, state["state1"], state["state2"]))
            if not parameters:
                continue
            kinds = {(one.value.dtype, one.gradient.dtype, one.value.device) for one in parameters}
            if len(kinds) > 1 or len(steps) > 1 or not all(map(_is_plain, parameters)):
                return None
            betas = group["betas"][0], group["betas"][1]
            found.append((parameters, Step(steps.pop() + 1, group["lr"], betas, group["eps"], group["weight_decay"])))
        return found


def _take(parameters: Sequence[Parameter], step: Step) -> None:
    from job.training.adamw_kernel import adamw_

    adamw_(parameters, *step)


def _free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


def _is_plain(one: Parameter) -> bool:
    moments = one.mean.dtype == one.square.dtype == torch.float32
    return moments and all(part.is_contiguous() for part in one)


def _agrees(like: Parameter) -> bool:
    """Whether the kernel agrees with bitsandbytes in this process. If not, a message says why.

    It is tested on made-up parameters of the same type, one of them larger than a program's block. A real gradient may
    still be zero, and so may the first step's rate.
    """
    generator = torch.Generator().manual_seed(0)
    step = Step(3, 0.01, (0.9, 0.99), 1e-8, 0.1)
    found = [_some(like, count, generator) for count in (100, 2500)]
    wanted = [Parameter(*(part.clone() for part in one)) for one in found]
    try:
        _take(found, step)
        for one in wanted:
            bnb.functional.optimizer_update_32bit(
                "adam", one.gradient, one.value, one.mean, step.betas[0], step.epsilon, step.number, step.rate, one.square,
                step.betas[1], weight_decay=step.weight_decay,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and kernels may raise anything
        reason = in_a_line(error)
        if not is_alive(like.value.device):
            raise KernelsFault(
                f"The optimizer's kernel crashed the GPU: {reason}.",
                "Set FT_OPTIM=adamw_torch. Another card may work.",
            ) from error
    else:
        if all(map(_is_near, found, wanted)):
            return True
        reason = "a test step gave wrong values"
    message(f"The optimizer updates one parameter at a time, which is slower: {reason}.", "warning")
    return False


def _some(like: Parameter, count: int, generator: torch.Generator) -> Parameter:
    value, gradient, mean, square = (torch.randn(count, generator=generator) for _ in range(4))
    moments = (part.to(like.value.device) for part in (mean, square.square()))
    return Parameter(0.1 * value.to(like.value), gradient.to(like.value.device, like.gradient.dtype), *moments)


def _is_near(found: Parameter, wanted: Parameter) -> bool:
    """Whether both agree. Values may differ by two units in the last place of bfloat16, far less than a step.

    bitsandbytes may round twice.
    """
    values = torch.allclose(found.value.float(), wanted.value.float(), rtol=2**-6, atol=1e-5)
    moments = zip((found.mean, found.square), (wanted.mean, wanted.square), strict=True)
    return values and all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in moments)
