"""Attention in the fused layer: every implementation gives what `attend` and autograd give.

PyTorch's kernels run only on GPUs, so plain PyTorch functions stand in for them here. Our own kernels run in Triton's
interpreter.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from job.model import attention
from job.model.fused import attention as fused_attention
from job.model.fused import attention_kernels, pointwise


class Kernels:
    """The two operations with the parameters of their schemas, computed row by row, for equal numbers of heads."""

    def __init__(self) -> None:
        self.random_state, self.unused = torch.zeros(2), torch.zeros(0)

    def forward(
        self, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float,
        is_causal: bool, return_debug_mask: bool, *, scale: float, window_size_left: int | None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert query.shape == key.shape == value.shape and cum_seq_q is cum_seq_k
        assert (dropout_p, is_causal, return_debug_mask, max_q, max_k) == (0.0, True, False, 9, 9)
        out = attention.row_by_row(query, key, value, cum_seq_q.tolist(), scale, _window(window_size_left))
        return out, torch.full((1,), 3.0), self.random_state, self.unused, torch.zeros(0)

    def backward(
        self, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, cum_seq_q: Any, cum_seq_k: Any,
        max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Any, unused: Any, *, scale: float,
        window_size_left: int | None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        assert rng_state is self.random_state and unused is self.unused and float(logsumexp) == 3.0
        assert (dropout_p, is_causal, max_q, max_k) == (0.0, True, 9, 9)
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (query, key, value)]
            again = attention.row_by_row(
                parts[0], parts[1], parts[2], cum_seq_q.tolist(), scale, _window(window_size_left)
            )
        assert torch.equal(again, out)
        return torch.autograd.grad(again, parts, grad_out)


def _window(left: int | None) -> int | None:
    return None if left is None else left + 1


def _names(operation: Any) -> list[str]:
    return [argument.name for argument in operation.default._schema.arguments if not argument.kwarg_only]


def _parameters(function: Callable[..., Any]) -> list[str]:
    kinds = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in kinds if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]


HEADS, DIM, SCALING = 6, 16, 0.4
BORDER = 8


class Case:
    """Heads within one tensor, as a product leaves them, and what autograd gives for them."""

    def __init__(
        self, shared: int, boundaries: list[int], rotated: int | None = DIM, window: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens, self.counts = boundaries[-1], [HEADS, shared, shared]

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        longest = max(end - begin for begin, end in itertools.pairwise(boundaries))
        where = torch.tensor(boundaries, dtype=torch.int32)
        angles = (None, None) if rotated is None else (some(tokens, rotated), some(tokens, rotated))
        self.rows = fused_attention.Rows(*angles, where, longest)
        self.scores = fused_attention.Scores(SCALING, window)
        self.of_out = some(tokens, HEADS * DIM)
        self.packed = some(tokens, sum(self.counts) * DIM + BORDER)
        parts = [part.detach().clone().requires_grad_() for part in self.heads()]
        out = attention.attend(parts[0], parts[1], parts[2], where, longest, SCALING, window)
        gradients = torch.autograd.grad(out, parts, self.of_out.view_as(out))
        self.out = out.detach().flatten(1)
        self.gradients = torch.empty(tokens, sum(self.counts) * DIM)
        pointwise.rotate_back(*gradients, self.rows.cos, self.rows.sin, self.gradients)

    def heads(self) -> list[torch.Tensor]:
        parts = torch.split(self.packed[:, :-BORDER], [count * DIM for count in self.counts], 1)
        return [part.unflatten(1, (-1, DIM)) for part in parts]  # type: ignore[no-untyped-call]

    def check(self, way: Callable[..., fused_attention.Attended]) -> None:
        out, place = (
            torch.full((len(self.of_out), width + BORDER), 7.0) for width in (HEADS * DIM, sum(self.counts) * DIM)
        )
        query, key, value = self.heads()
        with torch.no_grad():
            found = way(query, key, value, self.rows, self.scores, out)
            found.gradients_into_(self.of_out, place)
        assert not found.out.requires_grad
        for one, other in ((found.out, self.out), (out, self.out), (place, self.gradients)):
            torch.testing.assert_close(one[:, : other.shape[1]], other, rtol=1e-5, atol=1e-5)
        assert bool((out[:, -BORDER:] == 7).all() and (place[:, -BORDER:] == 7).all()), "the borders belong to others"


@pytest.mark.parametrize(("shared", "rotated", "window"), [(6, DIM, None), (2, 8, 3), (2, None, 9)])
def test_pytorchs_kernels_give_the_gradients_of_attention(
    monkeypatch: pytest.MonkeyPatch, shared: int, rotated: int | None, window: int | None
) -> None:
    operations, kernels = torch.ops.aten, Kernels()
    assert _parameters(kernels.forward) == _names(operations._flash_attention_forward)
    assert _parameters(kernels.backward) == _names(operations._flash_attention_backward)
    case = Case(shared, [0, 5, 14], rotated, window)
    case.check(fused_attention.attend)
    monkeypatch.setattr(fused_attention, "is_served", lambda states: True)
    monkeypatch.setattr(operations, "_flash_attention_forward", kernels.forward)
    monkeypatch.setattr(operations, "_flash_attention_backward", kernels.backward)
    monkeypatch.setattr(fused_attention, "_is_served_by_own", lambda states: False)
    case.check(fused_attention.attend)


@pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="tensors of this test are on the CPU")
@pytest.mark.parametrize("shared", [6, 2])
@pytest.mark.parametrize("boundaries", [[0, 5, 14], [0, 1, 65, 65, 129, 300]])
@pytest.mark.parametrize(("by_descriptors", "rotated"), [(True, DIM), (False, DIM), (False, 8), (True, None)])
def test_our_kernels_give_the_gradients_of_attention(
    monkeypatch: pytest.MonkeyPatch, shared: int, boundaries: list[int], by_descriptors: bool, rotated: int | None
) -> None:
    case = Case(shared, boundaries, rotated)
    monkeypatch.setattr(attention_kernels, "MANY_TOKENS", 1 if by_descriptors else 1000)
    monkeypatch.setattr(fused_attention, "is_served", lambda states: True)
    monkeypatch.setattr(fused_attention, "_is_served_by_own", lambda states: True)
    case.check(fused_attention.attend)


def test_every_token_is_in_one_tile_that_starts_where_its_row_does() -> None:
    boundaries = [0, 1, 65, 65, 129, 300]
    tiles = attention_kernels.tiles_of(torch.tensor(boundaries, dtype=torch.int32), 300).tolist()
    own = attention_kernels.OWN
    wanted = [[begin, end, first] for begin, end in itertools.pairwise(boundaries) for first in range(begin, end, own)]
    assert tiles[: len(wanted)] == wanted
    assert all(first >= end for _, end, first in tiles[len(wanted) :])
