"""Linear layers that multiply the same input, as one product: their frozen weights and the adapters beside them.

y_i = x W_iᵀ + s_i · dropout(x) A_iᵀ B_iᵀ (Hu et al. 2021, arXiv:2106.09685). The frozen part is one matrix product for all
of them, and where it can be the adapters' part is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from job.model.fused import pointwise
from job.model.merge import ADAPTER


Placed = tuple[int, torch.Tensor, torch.Tensor, float]  # of an adapter: which layer's it is, A, B, scale


class Bordered:
    """Frozen weights W, one above the other, with the adapters' matrices around them: (W, sB; A, 0).

    With x Aᵀ written beside x, and the gradient of x Aᵀ beside that of y, one product gives the sum with the adapters'
    part, rounded once; adding that part by itself would read and write the whole result again.
    """

    _shares_matrix = False

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int) -> None:
        self.border, self._layers = border, layers
        self._widths, self._inputs = [layer.out_features for layer in layers], layers[0].in_features
        self._outputs = sum(self._widths)

    def product(self, x: torch.Tensor, adapters: Sequence[Placed], out: torch.Tensor | None) -> torch.Tensor:
        """Of x with x Aᵀ beside it, the sum with the adapters' part: (tokens, all outputs)."""
        matrix = self._inner()
        self._surround(matrix, adapters)
        return torch.mm(x, matrix[: self._outputs].T, out=out)

    def gradient(self, of_y: torch.Tensor, adapters: Sequence[Placed]) -> torch.Tensor:
        """Of the gradient of y with that of x Aᵀ beside it, that of x; without it, the frozen part's alone. It belongs to
        the last `product`, whose adapters are the same."""
        matrix = self._inner()
        if self._shares_matrix:
            self._surround(matrix, adapters)
        return of_y @ matrix[: of_y.shape[1], : self._inputs]

    def _surround(self, matrix: torch.Tensor, adapters: Sequence[Placed]) -> None:
        """Write the adapters, as they are now, around W."""
        column = 0
        for layer, a, b, scale in adapters:
            begin, rank = sum(self._widths[:layer]), len(a)
            outputs = slice(begin, begin + self._widths[layer])
            inputs = slice(self._inputs + column, self._inputs + column + rank)
            pointwise.place(b, matrix[outputs, inputs], scale)
            below = slice(self._outputs + column, self._outputs + column + rank)
            pointwise.place(a, matrix[below, : self._inputs])
            column += rank

    def _inner(self) -> torch.Tensor:
        """The matrix, W in place."""
        raise NotImplementedError

    def _empty(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        shape = (self._outputs + self.border, self._inputs + self.border)
        return torch.zeros(shape, device=like.device, dtype=dtype)

    def _parts(self, matrix: torch.Tensor) -> Sequence[torch.Tensor]:
        """Where each layer's own weight lies in it."""
        return matrix[: self._outputs, : self._inputs].split(self._widths)


class Resident(Bordered):
    """Weights as they are multiplied with; each layer's own becomes a part of the matrix."""

    def __init__(self, layers: Sequence[torch.nn.Linear], border: int) -> None:
        super().__init__(layers, border)
        self._matrix = self._empty(layers[0].weight, layers[0].weight.dtype)
        for layer, part in zip(layers, self._parts(self._matrix), strict=True):
            part.copy_(layer.weight.data)
            layer.weight = torch.nn.Parameter(part, requires_grad=False)

    def _inner(self) -> torch.Tensor:
        return self._matrix


class FourBit(Bordered):
    """4-bit weights, dequantised for each product into a matrix that all products of one shape share."""

    _matrices: ClassVar[dict[Any, torch.Tensor]] = {}
    _shares_matrix = True

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit], border: int, ranks: Sequence[int]) -> None:
        super().__init__(layers, border)
        weight, dtype = layers[0].weight, layers[0].compute_dtype
        key = (weight.device, dtype, self._inputs, *self._widths, *ranks)  # the border's zeros lie where the ranks say
        if key not in self._matrices:
            self._matrices[key] = self._empty(weight, dtype)
        self._matrix = self._matrices[key]

    def _inner(self) -> torch.Tensor:
        for layer, part in zip(self._layers, self._parts(self._matrix), strict=True):
            pointwise.dequantize(layer.weight, out=part)
        return self._matrix


class EightBit:
    """Weights and inputs rounded to 8-bit floats, e4m3, with one scale a row (Micikevicius et al. 2022, arXiv:2209.05433).

    Both ways round, since a product sums over the rows of the one and its gradient over those of the other. This is not
    the mathematics of the 16-bit products: it is for who asks for it.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        matrix = torch.cat([layer.weight.data for layer in layers])
        self._by_output, self._by_input = (
            pointwise.quantize_rows(matrix),
            pointwise.quantize_rows(matrix.T.contiguous()),
        )
        for layer in layers:
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)  # nobody multiplies with it

    def product(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ: (tokens, inputs) → (tokens, all outputs)."""
        return _eight_bit_product(x, *self._by_output, out, fast=True)

    def gradient(self, of_y: torch.Tensor) -> torch.Tensor:
        """The gradient of x: (tokens, all outputs) → (tokens, inputs)."""
        return _eight_bit_product(of_y, *self._by_input, None, fast=False)


def _eight_bit_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, out: torch.Tensor | None, *, fast: bool
) -> torch.Tensor:
    """`fast` sums up in fewer digits than float32, which forward products stand and gradients do less."""
    values, scales = pointwise.quantize_rows(x)
    options = {"scale_a": scales, "scale_b": weight_scales.T, "out_dtype": x.dtype, "use_fast_accum": fast}
    return torch._scaled_mm(values, weight.T, **options, **({"out": out} if out is not None else {}))


@dataclass(frozen=True)
class Adapter:
    """One layer's LoRA: A (rank, inputs), B (outputs, rank)."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float


class Products:
    """Linear layers with one input. `layers` are peft's wrappers where they have an adapter, and plain layers where not.

    Inputs and gradients of outputs are given in tensors of `new_input` and `new_output`, which have room for the border.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], *, eight_bit: bool = False) -> None:
        bases = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
        self._layers = layers
        self._inputs, self._widths = bases[0].in_features, [base.out_features for base in bases]
        self._outputs = sum(self._widths)
        ranks = [len(adapter.a) if adapter else 0 for adapter in map(_adapter_of, layers)]
        self._frozen: Bordered | EightBit
        if all(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            self._frozen = FourBit(bases, sum(ranks), ranks)
        else:
            self._frozen = EightBit(bases) if eight_bit else Resident(bases, sum(ranks))
        self._border = self._frozen.border if isinstance(self._frozen, Bordered) else 0

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, A before B, layer by layer."""
        adapters = map(_adapter_of, self._layers)
        return [parameter for adapter in adapters if adapter for parameter in (adapter.a, adapter.b)]

    def new_input(self, like: torch.Tensor) -> torch.Tensor:
        """(tokens of `like`, inputs and border), for x in its first columns."""
        return like.new_empty(len(like), self._inputs + self._border)

    def new_output(self, like: torch.Tensor) -> torch.Tensor:
        """(tokens of `like`, all outputs and border), for y or its gradient in its first columns."""
        return like.new_empty(len(like), self._outputs + self._border)

    def forward(
        self, x: torch.Tensor, seeds: Sequence[int], out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """y (tokens, all outputs), and for the gradients the adapters' x Aᵀ."""
        narrow = self.narrow(x, seeds)
        out = None if out is None else out[:, : self._outputs]
        if isinstance(self._frozen, Bordered):
            column = self._inputs
            for of_group in narrow:
                pointwise.place(of_group, x[:, column : column + of_group.shape[1]])
                column += of_group.shape[1]
            return self._frozen.product(x, self._placed(seeds), out), narrow
        y = self._frozen.product(x, out)
        parts = y.split(self._widths, dim=1)
        for member, xa in self._each(narrow, seeds):
            parts[member.place].addmm_(xa, member.adapter.b.to(x.dtype).T, alpha=member.adapter.scale)
        return y, narrow

    def narrow(self, x: torch.Tensor, seeds: Sequence[int]) -> list[torch.Tensor]:
        """The adapters' x Aᵀ alone: (tokens, rank), those with one input side by side."""
        x = x[:, : self._inputs]
        return [group[0].dropped(x) @ _side_by_side(group, x.dtype).T for group in self._groups(seeds)]

    def input_gradient(
        self, of_y: torch.Tensor, seeds: Sequence[int], *, wanted: bool = True
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradient of x, if it is `wanted`, else nothing of any use; and those of the adapters' x Aᵀ."""
        groups = self._groups(seeds)
        narrow = [of_y.new_empty(len(of_y), sum(len(m.adapter.a) for m in group)) for group in groups]
        parts = of_y[:, : self._outputs].split(self._widths, dim=1)
        for member, of_xa in self._each(narrow, seeds):
            b, scale = member.adapter.b.to(of_y.dtype), member.adapter.scale
            torch.addmm(of_xa, parts[member.place], b, beta=0, alpha=scale, out=of_xa)
        if not wanted:
            return of_y, narrow
        own = of_y[:, : self._outputs]
        if isinstance(self._frozen, EightBit):
            gradient = self._frozen.gradient(own)
        elif len(groups) == 1 and not groups[0][0].adapter.dropout:
            pointwise.place(narrow[0], of_y[:, self._outputs :])
            return self._frozen.gradient(of_y, self._placed(seeds)), narrow
        else:
            gradient = self._frozen.gradient(own, ())
        for group, of_narrow in zip(groups, narrow, strict=True):
            group[0].add_input_gradient(gradient, of_narrow, _side_by_side(group, of_y.dtype))
        return gradient, narrow

    def parameter_gradients(
        self,
        of_y: torch.Tensor,
        of_narrow: Sequence[torch.Tensor],
        x: torch.Tensor,
        narrow: Sequence[torch.Tensor],
        seeds: Sequence[int],
    ) -> list[torch.Tensor]:
        """The gradients of `parameters()`."""
        parts = of_y[:, : self._outputs].split(self._widths, dim=1)
        of_a, x = [], x[:, : self._inputs]
        for group, of_group in zip(self._groups(seeds), of_narrow, strict=True):
            of_a += (of_group.T @ group[0].dropped(x)).split([len(member.adapter.a) for member in group])
        of_b = [(parts[m.place].T @ xa).mul_(m.adapter.scale) for m, xa in self._each(narrow, seeds)]
        found = [value for pair in zip(of_a, of_b, strict=True) for value in pair]
        return [value.to(parameter.dtype) for value, parameter in zip(found, self.parameters(), strict=True)]

    def _groups(self, seeds: Sequence[int]) -> list[list[_Member]]:
        """Adapters with the very same input together: all of them, but where each drops other values of it."""
        found = [
            _Member(place, adapter, seed)
            for place, (layer, seed) in enumerate(zip(self._layers, seeds, strict=True))
            if (adapter := _adapter_of(layer)) is not None
        ]
        if any(member.adapter.dropout for member in found):
            return [[member] for member in found]
        return [found] if found else []

    def _placed(self, seeds: Sequence[int]) -> list[Placed]:
        members = [member for group in self._groups(seeds) for member in group]
        return [(member.place, member.adapter.a, member.adapter.b, member.adapter.scale) for member in members]

    def _each(self, narrow: Sequence[torch.Tensor], seeds: Sequence[int]) -> Iterator[tuple[_Member, torch.Tensor]]:
        """Each adapter with its columns of what its group shares."""
        for group, of_group in zip(self._groups(seeds), narrow, strict=True):
            yield from zip(group, of_group.split([len(m.adapter.a) for m in group], dim=1), strict=True)


@dataclass(frozen=True)
class _Member:
    """An adapter, which of the layers it belongs to, and what its dropout draws from."""

    place: int
    adapter: Adapter
    seed: int

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return pointwise.dropout(x, self.adapter.dropout, self.seed) if self.adapter.dropout else x

    def add_input_gradient(self, gradient: torch.Tensor, of_narrow: torch.Tensor, a: torch.Tensor) -> None:
        if self.adapter.dropout:
            gradient += self.dropped(of_narrow @ a)
        else:
            gradient.addmm_(of_narrow, a)


def _side_by_side(group: Sequence[_Member], dtype: torch.dtype) -> torch.Tensor:
    matrices = [member.adapter.a.to(dtype) for member in group]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def _adapter_of(layer: torch.nn.Module) -> Adapter | None:
    if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
        return None
    dropout = layer.lora_dropout[ADAPTER]
    return Adapter(
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        float(layer.scaling[ADAPTER]),
        float(dropout.p) if isinstance(dropout, torch.nn.Dropout) and layer.training else 0.0,
    )
