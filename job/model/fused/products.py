"""Linear layers that multiply the same input, as one product: their frozen weights and the adapters beside them.

y_i = x W_iᵀ + s_i · dropout(x) A_iᵀ B_iᵀ (Hu et al. 2021, arXiv:2106.09685). The frozen part is one matrix product for all
of them. An adapter's part is added by the product itself, where its result lies, so that nothing passes over y again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer

from job.model.fused import pointwise
from job.model.merge import ADAPTER


class Frozen(Protocol):
    """The weights W of one or more layers, one above the other: (all outputs, inputs)."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ: (tokens, inputs) → (tokens, all outputs)."""

    def gradient(self, of_y: torch.Tensor) -> torch.Tensor:
        """The gradient of x: (tokens, all outputs) → (tokens, inputs)."""


class Resident:
    """Weights as they are multiplied with, in one piece of which each layer's own weight becomes a part."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        weights = [layer.weight.data for layer in layers]
        self.matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
        for layer, rows in zip(layers, self.matrix.split([len(weight) for weight in weights]), strict=True):
            layer.weight = torch.nn.Parameter(rows, requires_grad=False)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T

    def gradient(self, of_y: torch.Tensor) -> torch.Tensor:
        return of_y @ self.matrix


class EightBit:
    """Weights and inputs rounded to 8-bit floats, e4m3, with one scale a row (Micikevicius et al. 2022, arXiv:2209.05433).

    Both ways round, since a product sums over the rows of the one and its gradient over those of the other. This is not
    the mathematics of the 16-bit products: it is for who asks for it.
    """

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        matrix = torch.cat([layer.weight.data for layer in layers])
        self._by_output, self._by_input = pointwise.quantize_rows(matrix), pointwise.quantize_rows(matrix.T.contiguous())
        for layer in layers:
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False)  # nobody multiplies with it

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return _eight_bit_product(x, *self._by_output)

    def gradient(self, of_y: torch.Tensor) -> torch.Tensor:
        return _eight_bit_product(of_y, *self._by_input)


def _eight_bit_product(x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    values, scales = pointwise.quantize_rows(x)
    return torch._scaled_mm(values, weight.T, scale_a=scales, scale_b=weight_scales.T, out_dtype=x.dtype)


class FourBit:
    """4-bit weights, dequantised for each product into memory that all layers share."""

    _workspaces: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def __init__(self, layers: Sequence[bnb.nn.Linear4bit]) -> None:
        self._weights = [layer.weight for layer in layers]
        self._outputs = [layer.out_features for layer in layers]
        self._shape, self._dtype = (sum(self._outputs), layers[0].in_features), layers[0].compute_dtype

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._matrix().T

    def gradient(self, of_y: torch.Tensor) -> torch.Tensor:
        return of_y @ self._matrix()

    def _matrix(self) -> torch.Tensor:
        device, size = self._weights[0].device, self._shape[0] * self._shape[1]
        workspace = self._workspaces.get((device, self._dtype))
        if workspace is None or workspace.numel() < size:
            workspace = self._workspaces[device, self._dtype] = torch.empty(size, device=device, dtype=self._dtype)
        matrix = workspace[:size].view(self._shape)
        for weight, rows in zip(self._weights, matrix.split(self._outputs), strict=True):
            _dequantize(weight, rows)
        return matrix


def _dequantize(weight: bnb.nn.Params4bit, out: torch.Tensor) -> None:
    if out.device.type == "cuda" and weight.quant_state.dtype == out.dtype:
        bnb.functional.dequantize_4bit(weight.data, weight.quant_state, out=out)
    else:
        out.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))


def _frozen(layers: Sequence[torch.nn.Linear], eight_bit: bool) -> Frozen:
    if all(isinstance(layer, bnb.nn.Linear4bit) for layer in layers):
        return FourBit(layers)
    return EightBit(layers) if eight_bit else Resident(layers)


@dataclass(frozen=True)
class Adapter:
    """One layer's LoRA: A (rank, inputs), B (outputs, rank)."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float


class Products:
    """Linear layers with one input. `layers` are peft's wrappers where they have an adapter, and plain layers where not."""

    def __init__(self, layers: Sequence[torch.nn.Module], *, eight_bit: bool = False) -> None:
        bases = [layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers]
        self.frozen = _frozen(bases, eight_bit)
        self._outputs = [base.out_features for base in bases]
        self._layers = layers

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained, A before B, layer by layer."""
        adapters = map(_adapter_of, self._layers)
        return [parameter for adapter in adapters if adapter for parameter in (adapter.a, adapter.b)]

    def forward(self, x: torch.Tensor, seeds: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """y (tokens, all outputs), and for `backward` the adapters' x Aᵀ."""
        y = self.frozen.product(x)
        narrow = self.narrow(x, seeds)
        parts = y.split(self._outputs, dim=1)
        for group, of_group in zip(self._groups(seeds), narrow, strict=True):
            for member, xa in zip(group, of_group.split([len(m.adapter.a) for m in group], dim=1), strict=True):
                parts[member.place].addmm_(xa, member.adapter.b.to(x.dtype).T, alpha=member.adapter.scale)
        return y, narrow

    def narrow(self, x: torch.Tensor, seeds: Sequence[int]) -> list[torch.Tensor]:
        """The adapters' x Aᵀ alone: (tokens, rank), those with one input side by side."""
        return [group[0].dropped(x) @ _side_by_side(group, x.dtype).T for group in self._groups(seeds)]

    def backward(
        self, of_y: torch.Tensor, x: torch.Tensor, narrow: Sequence[torch.Tensor], seeds: Sequence[int], *, of_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The gradients of x, unless nobody wants it, and of `parameters()`."""
        gradient = self.frozen.gradient(of_y) if of_x else None
        of_parameters: list[torch.Tensor] = []
        parts = of_y.split(self._outputs, dim=1)
        for group, of_group in zip(self._groups(seeds), narrow, strict=True):
            ranks = [len(member.adapter.a) for member in group]
            of_narrow, of_b = torch.empty_like(of_group), []
            for member, xa, of_xa in zip(group, of_group.split(ranks, 1), of_narrow.split(ranks, 1), strict=True):
                part, scale = parts[member.place], member.adapter.scale
                torch.addmm(of_xa, part, member.adapter.b.to(x.dtype), beta=0, alpha=scale, out=of_xa)
                of_b.append((part.T @ xa).mul_(scale))
            of_a = (of_narrow.T @ group[0].dropped(x)).split(ranks)
            of_parameters += [value for pair in zip(of_a, of_b, strict=True) for value in pair]
            if gradient is not None:
                group[0].add_input_gradient(gradient, of_narrow, _side_by_side(group, x.dtype))
        return gradient, [value.to(p.dtype) for value, p in zip(of_parameters, self.parameters(), strict=True)]

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
