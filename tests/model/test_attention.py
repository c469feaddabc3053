"""How the attention kernels are called. They run on GPUs alone: here functions of PyTorch's own take their places."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from job.model import attention


class Kernels:
    """The two operations with the parameters of their schemas, computed row by row; for as many heads of each."""

    def __init__(self) -> None:
        self.random_state, self.unused = torch.zeros(2), torch.zeros(0)

    def forward(
        self, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, return_debug_mask: bool, *, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert query.shape == key.shape == value.shape and cum_seq_q is cum_seq_k
        assert (dropout_p, is_causal, return_debug_mask, max_q, max_k) == (0.0, True, False, 9, 9)
        out = attention._row_by_row(query, key, value, cum_seq_q.tolist(), scale)
        return out, torch.full((1,), 3.0), self.random_state, self.unused, torch.zeros(0)

    def backward(
        self, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any,
        max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Any, unused: Any, *, scale: float,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert rng_state is self.random_state and unused is self.unused and float(logsumexp) == 3.0
        assert (dropout_p, is_causal, max_q, max_k) == (0.0, True, 9, 9)
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (query, key, value)]
            again = attention._row_by_row(parts[0], parts[1], parts[2], cum_seq_q.tolist(), scale)
        assert torch.equal(again, out)
        return torch.autograd.grad(again, parts, grad_out)


def _names(operation: Any) -> list[str]:
    return [argument.name for argument in operation.default._schema.arguments if not argument.kwarg_only]


def _parameters(function: Callable[..., Any]) -> list[str]:
    kinds = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("shared", [6, 2])
def test_attention_by_hand_has_the_gradients_of_attention(monkeypatch: pytest.MonkeyPatch, shared: int) -> None:
    operations, kernels = torch.ops.aten, Kernels()
    assert _parameters(kernels.forward) == _names(operations._flash_attention_forward)
    assert _parameters(kernels.backward) == _names(operations._flash_attention_backward)
    generator = torch.Generator().manual_seed(0)
    query, key, value, of_out = (
        torch.randn(14, heads, 8, generator=generator).requires_grad_() for heads in (6, shared, shared, 6)
    )
    rows = torch.tensor([0, 5, 14], dtype=torch.int32)
    out = attention.attend(query, key, value, rows, 9, 0.4)
    wanted = torch.autograd.grad(out, [query, key, value], of_out)
    for by_kernel in (False, True):
        if by_kernel:
            monkeypatch.setattr(attention, "_is_served", lambda states: True)
            monkeypatch.setattr(operations, "_flash_attention_forward", kernels.forward)
            monkeypatch.setattr(operations, "_flash_attention_backward", kernels.backward)
        with torch.no_grad():
            found = attention.attend_by_hand(query, key, value, rows, 9, 0.4)
            gradients = found.gradients(of_out.detach())
        torch.testing.assert_close(found.out, out.detach())
        assert not found.out.requires_grad
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other)
