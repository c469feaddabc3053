"""Linear layers that multiply the same input, as one product: their frozen weights and the adapters beside them.

y_i = x W_iᵀ + s_i · dropout(x) A_iᵀ B_iᵀ (Hu et al. 2021, arXiv:2106.09685). Of several layers, the weights W lie one above
the other, and so do the A; the s B lie in blocks on a diagonal, b (all outputs, all ranks). So each of the formula's
products, and of its gradients', is one for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch.optim.optimizer import register_optimizer_step_post_hook

from job.model.fused import pointwise
from job.model.merge import ADAPTER

Draw = tuple[int, int]  # what dropout draws from: a seed, and where in the batch the tokens begin


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
    """The frozen weights, and with them `a` and `b`, copies of the adapters as they are at the last `product`."""

    border = 0
    a: torch.Tensor
    b: torch.Tensor

    def __init__(self) -> None:
        self._copied: Any = None

    def product(self, x: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + `narrow` bᵀ: (tokens, all outputs)."""
        raise NotImplementedError

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None) -> torch.Tensor:
        """`of_y` W + `of_narrow` a: (tokens, inputs)."""
        raise NotImplementedError

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Copy the adapters if they have changed."""
        state = (_Updates.count, *(part._version for adapter in adapters for part in (adapter.a, adapter.b)))
        if state == self._copied:
            return
        for adapter in adapters:
            pointwise.place(adapter.a, self.a[adapter.ranks])
            pointwise.place(adapter.b, self.b[adapter.outputs, adapter.ranks], adapter.scale)
        self._copied = state


class _Updates:
    """Counts optimizer steps: bitsandbytes' change parameters unseen by their version counters."""

    count = 0

    @classmethod
    def another(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_Updates.another)


class Bordered(Frozen):
    """16-bit weights W with the adapters around them in one matrix, (W, b; a, 0).

    With x Aᵀ written beside x, and the gradient of x Aᵀ beside that of y, one product gives the sum with the adapters'
    part, rounded once; adding that part by itself would read and write the whole result again.
    """

    def __init__(self, outputs: Sequence[int], inputs: int, border: int) -> None:
        super().__init__()
        self.border, self._widths = border, outputs
        self._outputs, self._inputs = sum(outputs), inputs

    def product(self, x: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        if narrow is not None:
            pointwise.place(narrow, x[:, self._inputs :])
        return torch.mm(x, self._above.T, out=out)

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None) -> torch.Tensor:
        if of_narrow is None:
            return of_y[:, : self._outputs] @ self._inner
        pointwise.place(of_narrow, of_y[:, self._outputs :])
        return of_y @ self._left

    def _empty(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shape = (self._outputs + self.border, self._inputs + self.border)
        return torch.zeros(shape, device=like.device, dtype=dtype)

    def _look_at(self, matrix: torch.Tensor) -> None:
        self._above, self._left = matrix[: self._outputs], matrix[:, : self._inputs]
        self._inner = matrix[: self._outputs, : self._inputs]
        self._parts = torch.split(self._inner, list(self._widths))
        self.a, self.b = matrix[self._outputs :, : self._inputs], matrix[: self._outputs, self._inputs :]


class Resident(Bordered):
    """Weights as they are multiplied with; each layer's own becomes a part of the matrix."""

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int) -> None:
        super().__init__([layer.out_features for layer in layers], layers[0].in_features, border)
        self._look_at(self._empty(layers[0].weight, layers[0].weight.dtype))
        for layer, part in zip(layers, self._parts, strict=True):
            part.copy_(layer.weight.data)
            layer.weight = torch.nn.Parameter(part, requires_grad=False)


class FourBit(Bordered):
    """4-bit weights, dequantised for each product into a matrix that all products of one shape share."""

    _matrices: ClassVar[dict[Any, torch.Tensor]] = {}

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit], ranks: Sequence[int]) -> None:
        super().__init__([layer.out_features for layer in layers], layers[0].in_features, sum(ranks))
        self._weights = [layer.weight for layer in layers]
        device, dtype = layers[0].weight.device, layers[0].compute_dtype
        key = (device, dtype, self._inputs, *self._widths, *ranks)  # b's zeros lie where the ranks say
        if key not in self._matrices:
            self._matrices[key] = self._empty(layers[0].weight, dtype)
        self._look_at(self._matrices[key])

    def refresh(self, adapters: Sequence[Adapter]) -> None:
        """Take the matrix over from whoever used it last."""
        for weight, part in zip(self._weights, self._parts, strict=True):
            pointwise.dequantize(weight, out=part)
        self._copied = None
        super().refresh(adapters)


class EightBit(Frozen):
    """Weights and inputs rounded to 8-bit floats, e4m3, with one scale a row (Micikevicius et al. 2022, arXiv:2209.05433).

    Both ways round, since a product sums over the rows of the one and its gradient over those of the other. This is not
    the mathematics of the 16-bit products: it is for who asks for it. The adapters' part stays in 16 bits.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int) -> None:
        super().__init__()
        matrix = torch.cat([layer.weight.data for layer in layers])
        self._by_output, self._by_input = (
            pointwise.quantize_rows(matrix),
            pointwise.quantize_rows(matrix.T.contiguous()),
        )
        self.a, self.b = matrix.new_zeros(border, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], border)
        for layer in layers:
            layer.weight = torch.nn.Parameter(
                layer.weight.new_empty(0), requires_grad=False
            )  # nobody multiplies with it

    def product(self, x: torch.Tensor, narrow: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        assert out is None, "there is no border to leave room for"
        y = pointwise.eight_bit_product(x, *self._by_output, fast=True)
        return y if narrow is None else y.addmm_(narrow, self.b.T)

    def gradient(self, of_y: torch.Tensor, of_narrow: torch.Tensor | None) -> torch.Tensor:
        gradient = pointwise.eight_bit_product(of_y, *self._by_input, fast=False)
        return gradient if of_narrow is None else gradient.addmm_(of_narrow, self.a)


class Products:
    """Linear layers with one input. `layers` are peft's wrappers where they have an adapter, and plain layers where not.

    Inputs and gradients of outputs are given in tensors of `new_input` and `new_output`, which have room for a border.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], *, eight_bit: bool = False) -> None:
        bases = [base_of(layer) for layer in layers]
        self._module = layers[0]
        self._inputs, self._outputs = int(bases[0].in_features), sum(int(base.out_features) for base in bases)
        self.adapters = list(_adapters(layers, [int(base.out_features) for base in bases]))
        self._border = sum(len(adapter.a) for adapter in self.adapters)
        self._frozen: Frozen
        if all(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            ranks = {adapter.seed: len(adapter.a) for adapter in self.adapters}
            self._frozen = FourBit(bases, [ranks.get(place, 0) for place in range(len(bases))])
        else:
            self._frozen = EightBit(bases, self._border) if eight_bit else Resident(bases, self._border)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, A before B, layer by layer."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    def new_input(self, like: torch.Tensor) -> torch.Tensor:
        """(tokens of `like`, inputs and border), for x in its first columns."""
        return like.new_empty(len(like), self._inputs + self._frozen.border)

    def new_output(self, like: torch.Tensor) -> torch.Tensor:
        """(tokens of `like`, all outputs and border), for y or its gradient in its first columns."""
        return like.new_empty(len(like), self._outputs + self._frozen.border)

    def forward(
        self, x: torch.Tensor, seeds: Sequence[Draw], *, room: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y (tokens, all outputs), with `room` for the border beside it; and for the gradients dropout(x) Aᵀ (tokens, all
        ranks), if anything is trained."""
        self._frozen.refresh(self.adapters)
        narrow = self._narrow(x, seeds)
        if not (room and self._frozen.border):
            return self._frozen.product(x, narrow, None), narrow
        whole = self.new_output(x)
        self._frozen.product(x, narrow, whole[:, : self._outputs])
        return whole, narrow

    def narrow(self, x: torch.Tensor, seeds: Sequence[Draw]) -> torch.Tensor | None:
        """dropout(x) Aᵀ alone."""
        self._frozen.refresh(self.adapters)
        return self._narrow(x, seeds)

    def _narrow(self, x: torch.Tensor, seeds: Sequence[Draw]) -> torch.Tensor | None:
        if not self.adapters:
            return None
        x = x[:, : self._inputs]
        if not self._drops:
            return x @ self._frozen.a.T
        narrow = x.new_empty(len(x), self._border)
        for adapter in self.adapters:
            dropped = pointwise.dropout(x, adapter.dropout, *seeds[adapter.seed])
            torch.mm(dropped, self._frozen.a[adapter.ranks].T, out=narrow[:, adapter.ranks])
        return narrow

    def input_gradient(
        self, of_y: torch.Tensor, seeds: Sequence[Draw], *, wanted: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of x, if it is `wanted`, else nothing of any use; and that of dropout(x) Aᵀ."""
        if isinstance(self._frozen, FourBit):
            self._frozen.refresh(self.adapters)
        of_narrow = of_y[:, : self._outputs] @ self._frozen.b if self.adapters else None
        if not wanted:
            return of_y, of_narrow
        if of_narrow is None or not self._drops:
            return self._frozen.gradient(of_y, of_narrow), of_narrow
        gradient = self._frozen.gradient(of_y, None)
        for adapter in self.adapters:
            of_dropped = of_narrow[:, adapter.ranks] @ self._frozen.a[adapter.ranks]
            gradient += pointwise.dropout(of_dropped, adapter.dropout, *seeds[adapter.seed])
        return gradient, of_narrow

    def parameter_gradients(
        self,
        of_y: torch.Tensor,
        of_narrow: torch.Tensor | None,
        x: torch.Tensor,
        narrow: torch.Tensor | None,
        seeds: Sequence[Draw],
    ) -> list[torch.Tensor]:
        """The gradients of `parameters`."""
        if of_narrow is None or narrow is None:
            return []
        x = x[:, : self._inputs]
        together = None if self._drops else of_narrow.T @ x
        found = []
        for adapter in self.adapters:
            if together is not None:
                of_a = together[adapter.ranks]
            else:
                of_a = of_narrow[:, adapter.ranks].T @ pointwise.dropout(x, adapter.dropout, *seeds[adapter.seed])
            of_b = of_y.new_empty(adapter.b.shape)
            own, beside = of_y[:, adapter.outputs].T, narrow[:, adapter.ranks]
            torch.addmm(of_b, own, beside, beta=0, alpha=adapter.scale, out=of_b)
            found += [of_a.to(adapter.a.dtype), of_b.to(adapter.b.dtype)]
        return found

    @property
    def _drops(self) -> bool:
        return self._module.training and any(adapter.dropout for adapter in self.adapters)


def base_of(layer: torch.nn.Module) -> Any:
    """The frozen linear layer, which peft's wrapper has inside."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _adapters(layers: Sequence[torch.nn.Module], widths: Sequence[int]) -> list[Adapter]:
    found: list[Adapter] = []
    for place, layer in enumerate(layers):
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.lora_dropout[ADAPTER]
        begin = found[-1].ranks.stop if found else 0
        first = sum(widths[:place])
        found.append(
            Adapter(
                a, b, float(layer.scaling[ADAPTER]), float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0,
                slice(first, first + widths[place]), slice(begin, begin + len(a)), place,
            )
        )  # fmt: skip
    return found
