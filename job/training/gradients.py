"""The gradients of a step: in one tensor for all parameters, and copied before a pass that may have to be repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class FlatGradients:
    """The gradients of `parameters` as parts of one tensor, which passes add to and one all-reduce averages.

    Passes must reach the parameters through `leaves`, which have the same values. DistributedDataParallel does not know
    them, so it neither copies their gradients nor sums them up one bucket after another. They stay where they are, as
    captured passes require.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        like = self._parameters[0]
        sizes = [parameter.numel() for parameter in self._parameters]
        self._flat = torch.zeros(sum(sizes), device=like.device, dtype=like.dtype)
        self._parts = [
            part.view_as(parameter)
            for part, parameter in zip(torch.split(self._flat, sizes), self._parameters, strict=True)
        ]
        self.leaves: Mapping[torch.nn.Parameter, torch.Tensor] = {
            parameter: parameter.detach().requires_grad_() for parameter in self._parameters
        }
        for leaf, part in zip(self.leaves.values(), self._parts, strict=True):
            leaf.grad = part

    def begin(self) -> None:
        """Start from the gradients that the parameters have, or from zero."""
        first = self._parameters[0].grad
        if first is None:
            self._flat.zero_()
        elif first.data_ptr() != self._flat.data_ptr():  # an earlier state, restored
            for part, parameter in zip(self._parts, self._parameters, strict=True):
                part.zero_() if parameter.grad is None else part.copy_(parameter.grad)

    def end(self, *, processes: int) -> None:
        """Give the parameters their gradients. With several `processes`, first average over them."""
        if processes > 1:
            torch.distributed.all_reduce(self._flat)
            self._flat.div_(processes)
        for part, parameter in zip(self._parts, self._parameters, strict=True):
            parameter.grad = part


class Gradients:
    """A copy of the gradients before a pass, to restore when the pass fails.

    There is something to copy only if a step sums up (`accumulate`) the gradients of several batches.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, accumulate: bool) -> None:
        self._parameters = parameters
        self._found = [
            parameter.grad.clone() if accumulate and parameter.grad is not None else None for parameter in parameters
        ]

    def restore(self) -> None:
        for parameter, gradient in zip(self._parameters, self._found, strict=True):
            parameter.grad = gradient
