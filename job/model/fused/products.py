"""Linear layers with the same input, computed as one product: their frozen weights together with their adapters.

y_i = x W_iᵀ + s_i · dropout(x) A_iᵀ B_iᵀ (Hu et al. 2021, arXiv:2106.09685). The weights W of several layers are
stacked, and so are the A. The s B are the blocks of a block-diagonal matrix b (all outputs, all ranks). So each product
of the formula, and of its gradients, is computed once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from job.model.changes import ADAPTER
from job.model.fused import pointwise
from job.model.fused.frozen import Adapter, EightBit, FourBit, Frozen, Resident, padded
from job.model.fused.rounding import Rounded
from job.model.fused.workspace import Workspace
from job.model.patches import Patches


class Draw(NamedTuple):
    """What `pointwise.dropout_` drops by: a seed, the tokens' place in the batch, and what is added to both later."""

    seed: int
    first_row: int
    moment: torch.Tensor | None


@dataclass(frozen=True)
class Normed:
    """A norm's result that is not stored: `x` (tokens, width) · `inverse` (tokens, 1) · `weight` (width)."""

    x: torch.Tensor
    inverse: torch.Tensor
    weight: torch.Tensor
    epsilon: float

    def values(self) -> torch.Tensor:
        """Compute the norm's result again: (tokens, width)."""
        out = torch.empty_like(self.x)
        pointwise.rms_norm_(self.x, self.weight, self.epsilon, out)
        return out

    def products(self, other: torch.Tensor) -> torch.Tensor:
        """otherᵀ · result, (ranks, width) in float32, for `other` (tokens, ranks).

        `inverse` scales the narrow `other` and `weight` the small sum, so the wide result is never computed.
        """
        if self.x.dtype == torch.float16:  # the factor may overflow its range
            return pointwise.gradient_product(other, self.values())
        scaled = other.new_empty(other.shape)
        pointwise.place(other, scaled, self.inverse)
        return pointwise.gradient_product(scaled, self.x).mul_(self.weight)


class Products:
    """Linear layers with the same input. `layers` are peft's wrappers if they have an adapter, else plain layers.

    Inputs are passed in tensors of `new_input`, and gradients of outputs in tensors of `new_output`. Both have room for
    a border. An input is in the columns that `inner` returns, a gradient in the first columns.
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], workspace: Workspace, patches: Patches, *, eight_bit: bool = False
    ) -> None:
        bases = [base_of(layer) for layer in layers]
        self._module = layers[0]
        self._inputs, self._outputs = int(bases[0].in_features), sum(int(base.out_features) for base in bases)
        self.adapters = list(_adapters(layers, [int(base.out_features) for base in bases]))
        found = {adapter.seed: padded(len(adapter.a)) for adapter in self.adapters}
        self._border, self._pads = sum(found.values()), any(len(one.a) % 8 for one in self.adapters)
        ranks = [found.get(place, 0) for place in range(len(bases))]
        self._frozen: Frozen
        if all(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            self._frozen = FourBit(bases, ranks, workspace)
        else:
            self._frozen = (
                EightBit(bases, self._border, workspace, patches)
                if eight_bit
                else Resident(bases, ranks, workspace, patches)
            )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters layer by layer, A before B."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    @property
    def border(self) -> int:
        """The number of extra columns of inputs and outputs."""
        return self._frozen.border

    def new_input(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor for x, (tokens of `like`, inputs + border). Write x to its `inner` columns."""
        return like.new_empty(like.shape[0], self._inputs + self._frozen.border)

    def inner(self, wide: torch.Tensor) -> torch.Tensor:
        """The columns of `wide` that hold x itself: (tokens, inputs)."""
        return wide[:, self._frozen.before : self._frozen.before + self._inputs]

    def new_output(self, like: torch.Tensor) -> torch.Tensor:
        """An empty tensor for y or its gradient in its first columns: (tokens of `like`, all outputs + border)."""
        return like.new_empty(like.shape[0], self._outputs + self._frozen.border)

    def rounded_input(self, like: torch.Tensor) -> Rounded | None:
        """An empty `Rounded` for the input, if `forward_` also takes it in 8 bits. None otherwise."""
        return self._frozen.new_rounded(like, self._inputs)

    def rounded_output(self, like: torch.Tensor) -> Rounded | None:
        """An empty `Rounded` for the gradient of y, if `input_gradient_` also takes it in 8 bits. None otherwise."""
        return self._frozen.new_rounded(like, self._outputs)

    def forward_(
        self, x_: torch.Tensor, seeds: Sequence[Draw], *, room: bool = False, rounded: Rounded | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return y (tokens, all outputs) and, for the gradients, dropout(x) Aᵀ (tokens, all ranks) or None.

        `x_` is a tensor of `new_input`; its border is overwritten. With `room`, y is returned with its border.
        """
        self._frozen.refresh(self.adapters)
        narrow = self._narrow(x_, seeds)
        if not (room and self._frozen.border):
            return self._frozen.product_(x_, narrow, None, rounded), narrow
        whole = self.new_output(x_)
        self._frozen.product_(x_, narrow, whole[:, : self._outputs], rounded)
        return whole, narrow

    def forward_gated(
        self, gate_up: torch.Tensor, seeds: Sequence[Draw], *, gelu: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward_` of x = act(gate) · up, for gate and up side by side: (tokens, 2 · inputs)."""
        x, rounded = self.new_input(gate_up), self._frozen.new_rounded(gate_up, self._inputs)
        if rounded is not None or self.drops or not self.adapters:
            pointwise.gated(gate_up, self.inner(x), rounded, gelu=gelu)
            return self.forward_(x, seeds, rounded=rounded)
        self._frozen.refresh(self.adapters)
        narrow = pointwise.gated_narrow(gate_up, self._frozen.a, self.inner(x), gelu=gelu)
        return self._frozen.product_(x, narrow, None, None), narrow

    def _narrow(self, x: torch.Tensor, seeds: Sequence[Draw]) -> torch.Tensor | None:
        """dropout(x) Aᵀ: (tokens, all ranks)."""
        if not self.adapters:
            return None
        x = self.inner(x)
        if not self.drops:
            return x @ self._frozen.a.T
        narrow = x.new_zeros(x.shape[0], self._border) if self._pads else x.new_empty(x.shape[0], self._border)
        for adapter in self.adapters:
            dropped = pointwise.dropout_(x, adapter.dropout, *seeds[adapter.seed])
            torch.mm(dropped, self._frozen.a[adapter.ranks].T, out=narrow[:, adapter.ranks])
        return narrow

    def input_gradient_(
        self, of_y_: torch.Tensor, seeds: Sequence[Draw], *, wanted: bool = True, rounded: Rounded | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of x (tokens, inputs) and of dropout(x) Aᵀ (tokens, all ranks).

        `of_y_` is a tensor of `new_output`; its border is overwritten. Ignore the first result unless it was `wanted`.
        """
        if isinstance(self._frozen, FourBit):
            self._frozen.refresh(self.adapters)
        of_narrow = self._frozen.narrow_gradient_(of_y_) if self.adapters else None
        if not wanted:
            return of_y_, of_narrow
        drops = self.drops
        gradient = self._frozen.gradient(of_y_, None if drops else of_narrow, rounded)
        if of_narrow is not None and drops:
            for adapter in self.adapters:
                of_dropped = of_narrow[:, adapter.ranks] @ self._frozen.a[adapter.ranks]
                pointwise.dropout_(of_dropped, adapter.dropout, *seeds[adapter.seed], add_to_=gradient)
        return gradient, of_narrow

    def of_a(
        self, of_narrow: torch.Tensor | None, x: torch.Tensor | Normed, seeds: Sequence[Draw]
    ) -> list[torch.Tensor]:
        """The gradients of the A, adapter by adapter: (rank, inputs) each, in float32."""
        if of_narrow is None:
            return []
        if not self.drops:
            together = x.products(of_narrow) if isinstance(x, Normed) else pointwise.gradient_product(of_narrow, x)
            return [together[adapter.ranks] for adapter in self.adapters]
        x = x.values() if isinstance(x, Normed) else x
        return [
            pointwise.gradient_product(
                of_narrow[:, adapter.ranks], pointwise.dropout_(x, adapter.dropout, *seeds[adapter.seed])
            )
            for adapter in self.adapters
        ]

    def of_b(self, of_y: torch.Tensor, narrow: torch.Tensor | None) -> list[torch.Tensor]:
        """The gradients of the B, adapter by adapter: (outputs, rank) each, in float32."""
        if narrow is None:
            return []
        return [
            pointwise.gradient_product(of_y[:, adapter.outputs], narrow[:, adapter.ranks], adapter.scale)
            for adapter in self.adapters
        ]

    def in_order(self, of_a: Sequence[torch.Tensor], of_b: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradients in the order and types of `parameters`."""
        both = [part for pair in zip(of_a, of_b, strict=True) for part in pair]
        return [gradient.to(parameter.dtype) for gradient, parameter in zip(both, self.parameters, strict=True)]

    @property
    def drops(self) -> bool:
        return self._module.training and any(adapter.dropout for adapter in self.adapters)


def base_of(layer: torch.nn.Module) -> Any:
    """The frozen linear layer inside peft's wrapper, or the layer itself if it is not wrapped."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _adapters(layers: Sequence[torch.nn.Module], widths: Sequence[int]) -> list[Adapter]:
    found: list[Adapter] = []
    for place, layer in enumerate(layers):
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.lora_dropout[ADAPTER]
        begin = sum(padded(len(one.a)) for one in found)
        first = sum(widths[:place])
        found.append(
            Adapter(
                a, b, float(layer.scaling[ADAPTER]), float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0,
                slice(first, first + widths[place]), slice(begin, begin + len(a)), place,
            )
        )  # fmt: skip
    return found
