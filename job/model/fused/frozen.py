"""Frozen weights of layers with one input, in 16, 8 or 4 bits, and copies of the adapters beside or around them."""

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

_ALIGNED = 8  # columns, which 16 bytes are: products want their matrices to begin at such places


@dataclass(frozen=True)
class Adapter:
    """One layer's LoRA: A (rank, inputs), B (outputs, rank), and the rows and columns of b that are its own."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float
    outputs: slice
    ranks: slice
    seed: int  # which of the product's seeds is its own


class Frozen:
    """The frozen weights, and with them copies of the adapters as they are at the last `product`: `a`, all A one above the
    other, and the B."""

    border = 0  # columns that inputs and outputs have beside their own
    before = 0  # how many of an input's lie before it
    a: torch.Tensor

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._copied: Any = None

    def new_rounded(self, like: torch.Tensor, columns: int) -> Rounded | None:
        """Where `product` and `gradient` want what they are given in 8 bits as well; None if they do not."""
        return None

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        """x Wᵀ + `narrow` bᵀ: (tokens, all outputs)."""
        raise NotImplementedError

    def narrow_gradient_(self, of_y_: torch.Tensor) -> torch.Tensor:
        """`of_y` b: (tokens, all ranks)."""
        raise NotImplementedError

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None, rounded: Rounded | None) -> torch.Tensor:
        """`of_y` W, and if `of_narrow` is given, which `narrow_gradient_` made of the same, + `of_narrow` a: (tokens, inputs)."""
        raise NotImplementedError

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Copy the adapters if they have changed."""
        state = (self._workspace.updates, *(part._version for adapter in adapters for part in (adapter.a, adapter.b)))
        if state == self._copied:
            return
        if adapters:
            pointwise.place_all(*self._copies(adapters))
        self._copied = state

    def _copies(self, adapters: Sequence[Adapter]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
        """From where, to where, and times what."""
        values = [part.detach() for adapter in adapters for part in (adapter.a, adapter.b)]
        places = [place for adapter in adapters for place in (self.a[adapter.ranks], self._b_of(adapter))]
        return values, places, [scale for adapter in adapters for scale in (1.0, adapter.scale)]

    def _b_of(self, adapter: Adapter) -> torch.Tensor:
        """Where the copy of its B lies, times its scale."""
        raise NotImplementedError


class Bordered(Frozen):
    """16-bit weights W with the adapters around them in one matrix, (W, b; a, 0).

    With x Aᵀ written beside x, and the gradient of x Aᵀ beside that of y, one product gives the sum with the adapters'
    part, rounded once; adding that part by itself would read and write the whole result again. Of two layers, the first has its
    part before x and the second behind it, and each multiplies with its own alone, (b₁, W₁, 0; 0, W₂, b₂): half of the
    adapters' part would be zeros.
    """

    def __init__(self, outputs: Sequence[int], inputs: int, ranks: Sequence[int], workspace: Workspace) -> None:
        super().__init__(workspace)
        self.border, self._widths, self._ranks = sum(ranks), outputs, ranks
        self._outputs, self._inputs = sum(outputs), inputs
        if len(ranks) == 2 and min(ranks) > 0 and ranks[0] % _ALIGNED == 0:
            self.before = ranks[0]

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        end = self.before + self._inputs
        if narrow is not None:
            pointwise.place(narrow[:, self.before :], x_[:, end:])
        if not self.before:
            return torch.mm(x_, self._above_turned, out=out)
        assert narrow is not None
        pointwise.place(narrow[:, : self.before], x_[:, : self.before])
        first, out = self._widths[0], x_.new_empty(len(x_), self._outputs) if out is None else out
        torch.mm(x_[:, :end], self._first_turned, out=out[:, :first])
        torch.mm(x_[:, self.before :], self._second_turned, out=out[:, first:])
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
        """Take the parts of `matrix` that products need; each view takes the host a microsecond."""
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
            return self._above[adapter.outputs, : self.before]
        ranks = slice(adapter.ranks.start - self.before, adapter.ranks.stop - self.before)
        return self._behind[adapter.outputs, ranks]


class Resident(Bordered):
    """Weights as they are multiplied with; each layer's own becomes a part of the matrix."""

    def __init__(
        self, layers: Sequence[torch.nn.Linear], ranks: Sequence[int], workspace: Workspace, patches: Patches
    ) -> None:
        super().__init__([layer.out_features for layer in layers], layers[0].in_features, ranks, workspace)
        weight = layers[0].weight
        self._look_at(torch.zeros(self._shape, device=weight.device, dtype=weight.dtype))
        for layer, part in zip(layers, self._parts, strict=True):
            part.copy_(layer.weight.data)
            patches.replace_weight(layer, part)


class FourBit(Bordered):
    """4-bit weights, dequantised for each product into a matrix that all products of one shape share."""

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit], ranks: Sequence[int], workspace: Workspace) -> None:
        super().__init__([layer.out_features for layer in layers], layers[0].in_features, ranks, workspace)
        self._weights = [layer.weight for layer in layers]
        device, dtype = layers[0].weight.device, layers[0].compute_dtype
        key = (device, dtype, self._inputs, *self._widths, *ranks)  # the ranks say where the zeros are
        self._look_at(workspace.matrix(key, self._shape, layers[0].weight, dtype))

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Take the matrix over from whoever used it last."""
        pointwise.dequantize(self._weights, self._parts)
        self._copied = None
        super().refresh(adapters)


class EightBit(Frozen):
    """Weights and inputs rounded to 8-bit floats, e4m3, with one scale a row (Micikevicius et al. 2022, arXiv:2209.05433).

    Both ways round, since a product sums over the rows of the one and its gradient over those of the other. This is not
    the mathematics of the 16-bit products: it is for who asks for it. The adapters' part stays in 16 bits.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int, workspace: Workspace, patches: Patches) -> None:
        super().__init__(workspace)
        matrix = torch.cat([layer.weight.data for layer in layers])
        self._by_output, self._by_input = (
            pointwise.quantize_rows(matrix),
            pointwise.quantize_rows(matrix.T.contiguous()),
        )
        self.a, self._b = matrix.new_zeros(border, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], border)
        for layer in layers:
            patches.replace_weight(layer, layer.weight.new_empty(0))  # nobody multiplies with it

    def new_rounded(self, like: torch.Tensor, columns: int) -> Rounded | None:
        return Rounded.empty(like, columns)

    def product_(
        self, x_: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None, rounded: Rounded | None
    ) -> torch.Tensor:
        assert out is None, "there is no border to leave room for"
        y = pointwise.eight_bit_product(rounded or pointwise.quantize_rows(x_), self._by_output, x_.dtype, fast=True)
        return y if narrow is None else y.addmm_(narrow, self._b.T)

    def _b_of(self, adapter: Adapter) -> torch.Tensor:
        return self._b[adapter.outputs, adapter.ranks]

    def narrow_gradient_(self, of_y_: torch.Tensor) -> torch.Tensor:
        return of_y_ @ self._b

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None, rounded: Rounded | None) -> torch.Tensor:
        values = rounded or pointwise.quantize_rows(of_y)
        gradient = pointwise.eight_bit_product(values, self._by_input, of_y.dtype, fast=False)
        return gradient if of_narrow is None else gradient.addmm_(of_narrow, self.a)
