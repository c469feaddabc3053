"""Frozen weights of layers with the same input, in 16, 8 or 4 bits, with copies of the adapters around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch

from job.model.fused import pointwise
from job.model.fused.rounding import Rounded
from job.model.fused.workspace import Workspace
from job.model.patches import Patches

_ALIGNED = 8  # columns of 16 bits make 16 bytes; products are faster if their matrices start at multiples of that


def padded(rank: int) -> int:
    """The columns of a border that an adapter of this rank takes. Those beyond the rank stay zero."""
    return -(-rank // _ALIGNED) * _ALIGNED


def bias_of(layers: Sequence[torch.nn.Linear], dtype: torch.dtype) -> torch.Tensor | None:
    """The biases of layers side by side, (all outputs) in `dtype`, or None if none of them has one."""
    biases: list[Any] = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return None
    parts = [
        layer.weight.new_zeros(layer.out_features, dtype=dtype) if bias is None else bias.data.to(dtype)
        for layer, bias in zip(layers, biases, strict=True)
    ]
    return torch.cat(parts)


@dataclass(frozen=True)
class Adapter:
    """One layer's LoRA: A (rank, inputs), B (outputs, rank), and its rows (`outputs`) and columns (`ranks`) of b.

    The columns begin at a multiple of 8, and up to the next multiple after them the border holds zeros.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float
    outputs: slice
    ranks: slice
    seed: int  # index into the product's seeds


class Frozen:
    """The frozen weights W with copies of the adapters as of the last `refresh`: `a`, which is all A stacked, and b.

    `bias` (all outputs) is added to products, if the layers have any.
    """

    border = 0  # extra columns of inputs and outputs
    before = 0  # how many of them are to the left of an input
    a: torch.Tensor

    def __init__(self, workspace: Workspace, bias: torch.Tensor | None) -> None:
        self._workspace, self.bias = workspace, bias
        self._copied: Any = None

    def new_rounded(self, like: torch.Tensor, columns: int) -> Rounded | None:
        """An empty `Rounded`, if `product_` and `gradient` also take their argument in 8 bits. None otherwise."""
        return None

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        """x Wᵀ + `narrow` bᵀ + bias: (tokens, all outputs), into `out` if given. `narrow` is written to the border of `x_`."""
        raise NotImplementedError

    def narrow_gradient_(self, of_y_: torch.Tensor) -> torch.Tensor:
        """∂L/∂narrow = `of_y_` b: (tokens, all ranks), written to the border of `of_y_` if it has one."""
        raise NotImplementedError

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None, rounded: Rounded | None) -> torch.Tensor:
        """`of_y` W (tokens, inputs), plus `of_narrow` a if `of_narrow` is given.

        `of_narrow` must be the result of `narrow_gradient_` for the same `of_y`, since it may be read from the border.
        """
        raise NotImplementedError

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Copy the adapters again if they have changed."""
        state = (self._workspace.updates, *(part._version for adapter in adapters for part in (adapter.a, adapter.b)))
        if state == self._copied and not self._workspace.captures:
            return
        if adapters:
            pointwise.place_all(*self._copies(adapters))
        self._copied = state

    def _copies(self, adapters: Sequence[Adapter]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """Sources, destinations and factors of the copies."""
        values = [part.detach() for adapter in adapters for part in (adapter.a, adapter.b)]
        places = [place for adapter in adapters for place in (self.a[adapter.ranks], self._b_of(adapter))]
        return values, places, [scale for adapter in adapters for scale in (1.0, adapter.scale)]

    def _b_of(self, adapter: Adapter) -> torch.Tensor:
        """The block of b that holds this adapter's B times its scale."""
        raise NotImplementedError


class Bordered(Frozen):
    """16-bit weights W with the adapters around them in one matrix, (W, b; a, 0). The package's docstring draws it.

    With x Aᵀ beside x, and its gradient beside that of y, one product gives the sum including the adapters' term,
    rounded once. Adding that term separately would read and write the whole result again. Two adapted layers use (b₁,
    W₁, 0; 0, W₂, b₂), with one border on each side of x. Each layer multiplies with its own b only, since half of a
    common b is zeros.
    """

    def __init__(
        self,
        outputs: Sequence[int],
        inputs: int,
        ranks: Sequence[int],
        workspace: Workspace,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__(workspace, bias)
        self.border, self._widths, self._ranks = sum(ranks), outputs, ranks
        self._outputs, self._inputs = sum(outputs), inputs
        if len(ranks) == 2 and min(ranks) > 0:
            self.before = ranks[0]
        self._biases = (None, None) if bias is None else bias.split_with_sizes([outputs[0], self._outputs - outputs[0]])

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        end = self.before + self._inputs
        if narrow is not None:
            pointwise.place(narrow[:, self.before :], x_[:, end:])
        if not self.before:
            return _product(x_, self._above_turned, self.bias, out)
        assert narrow is not None
        pointwise.place(narrow[:, : self.before], x_[:, : self.before])
        first, out = self._widths[0], x_.new_empty(len(x_), self._outputs) if out is None else out
        _product(x_[:, :end], self._first_turned, self._biases[0], out[:, :first])
        _product(x_[:, self.before :], self._second_turned, self._biases[1], out[:, first:])
        return out

    def narrow_gradient_(self, of_y_: torch.Tensor) -> torch.Tensor:
        of_narrow = of_y_[:, self._outputs :]
        if not self.before:
            return torch.mm(of_y_[:, : self._outputs], self._behind, out=of_narrow)
        first = self._widths[0]
        torch.mm(of_y_[:, :first], self._first_b, out=of_narrow[:, : self.before])
        torch.mm(of_y_[:, first : self._outputs], self._second_b, out=of_narrow[:, self.before :])
        return of_narrow

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None, rounded: Rounded | None) -> torch.Tensor:
        return of_y[:, : self._outputs] @ self._inner if of_narrow is None else of_y @ self._left

    @property
    def _shape(self) -> tuple[int, int]:
        return self._outputs + self.border, self._inputs + self.border

    def _look_at(self, matrix: torch.Tensor) -> None:
        """Take the views of `matrix` that products need, once: each view costs the host a microsecond."""
        end = self.before + self._inputs
        self._above, self._left = matrix[: self._outputs], matrix[:, self.before : end]
        self._inner, self._behind = self._left[: self._outputs], self._above[:, end:]
        self._parts = torch.split(self._inner, list(self._widths))
        self.a = self._left[self._outputs :]
        self._above_turned, first = self._above.T, self._widths[0]
        if self.before:
            self._first_turned, self._second_turned = self._above[:first, :end].T, self._above[first:, self.before :].T
            self._first_b, self._second_b = self._above[:first, : self.before], self._behind[first:]

    def _b_of(self, adapter: Adapter) -> torch.Tensor:
        if self.before and adapter.ranks.start == 0:
            return self._above[adapter.outputs, adapter.ranks]
        ranks = slice(adapter.ranks.start - self.before, adapter.ranks.stop - self.before)
        return self._behind[adapter.outputs, ranks]


def _product(
    x: torch.Tensor, turned: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    return torch.mm(x, turned, out=out) if bias is None else torch.addmm(bias, x, turned, out=out)


class Resident(Bordered):
    """16-bit weights. Each layer's weight is replaced by a view of the matrix."""

    def __init__(
        self, layers: Sequence[torch.nn.Linear], ranks: Sequence[int], workspace: Workspace, patches: Patches
    ) -> None:
        weight = layers[0].weight
        outputs, bias = [layer.out_features for layer in layers], bias_of(layers, weight.dtype)
        super().__init__(outputs, layers[0].in_features, ranks, workspace, bias)
        self._look_at(torch.zeros(self._shape, device=weight.device, dtype=weight.dtype))
        for layer, part in zip(layers, self._parts, strict=True):
            part.copy_(layer.weight.data)
            patches.replace_weight(layer, part)


class FourBit(Bordered):
    """4-bit weights, dequantized for each product into a matrix that all products of the same shape share."""

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit], ranks: Sequence[int], workspace: Workspace) -> None:
        device, dtype = layers[0].weight.device, layers[0].compute_dtype
        outputs, bias = [layer.out_features for layer in layers], bias_of(layers, dtype)
        super().__init__(outputs, layers[0].in_features, ranks, workspace, bias)
        self._weights = [layer.weight for layer in layers]
        key = (device, dtype, self._inputs, *self._widths, *ranks)  # the ranks determine where the zeros are
        self._look_at(workspace.matrix(key, self._shape, layers[0].weight, dtype))

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Fill the shared matrix with these weights and adapters, since another layer may have used it last."""
        pointwise.dequantize(self._weights, self._parts)
        self._copied = None
        super().refresh(adapters)


class EightBit(Frozen):
    """Weights and inputs in 8-bit floats, e4m3, with a scale per row (Micikevicius et al. 2022, arXiv:2209.05433).

    The weights are stored twice, scaled per output and per input: the product sums over inputs, its gradient over
    outputs. Results differ from those of 16-bit products, so the user has to ask for it. The adapters stay in 16 bits.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int, workspace: Workspace, patches: Patches) -> None:
        super().__init__(workspace, bias_of(layers, layers[0].weight.dtype))
        matrix = torch.cat([layer.weight.data for layer in layers])
        self._by_output, self._by_input = (
            pointwise.quantize_rows(matrix),
            pointwise.quantize_rows(matrix.T.contiguous()),
        )
        self.a, self._b = matrix.new_zeros(border, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], border)
        for layer in layers:
            patches.replace_weight(layer, layer.weight.new_empty(0))  # nothing multiplies with it anymore

    def new_rounded(self, like: torch.Tensor, columns: int) -> Rounded | None:
        return Rounded.empty(like, columns)

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        assert out is None, "8-bit products have no border, so the caller needs no room for one"
        y = pointwise.eight_bit_product(rounded or pointwise.quantize_rows(x_), self._by_output, x_.dtype, fast=True)
        if self.bias is not None:
            y += self.bias
        return y if narrow is None else y.addmm_(narrow, self._b.T)

    def _b_of(self, adapter: Adapter) -> torch.Tensor:
        return self._b[adapter.outputs, adapter.ranks]

    def narrow_gradient_(self, of_y_: torch.Tensor) -> torch.Tensor:
        return of_y_ @ self._b

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None, rounded: Rounded | None) -> torch.Tensor:
        values = rounded or pointwise.quantize_rows(of_y)
        gradient = pointwise.eight_bit_product(values, self._by_input, of_y.dtype, fast=False)
        return gradient if of_narrow is None else gradient.addmm_(of_narrow, self.a)
