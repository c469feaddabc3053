"""4-bit weights with bitsandbytes (Dettmers et al. 2023, QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import numpy
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from job.model.patches import Patches
from job.settings import Settings

_BLOCK = 64  # weights that share a constant


def four_bit_config(settings: Settings, dtype: torch.dtype) -> BitsAndBytesConfig:
    """FT_BNB_4BIT_QUANT_TYPE and FT_USE_NESTED_QUANT as transformers' config, with products in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=settings.use_nested_quant,
        # the same bytes with another type, since only floating types can be sharded
        **({"bnb_4bit_quant_storage": dtype} if settings.sharding == "full" else {}),
    )


def keep_plain_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking weights for AVX512-BF16 in evaluation mode.

    It does so in the first forward pass on such CPUs and cannot undo it. It also fails if `in_features` is not a
    multiple of 64 (seen with bitsandbytes 0.50.2). The plain layout gives the same numbers.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def make_resident(model: torch.nn.Module, patches: Patches) -> None:
    """Replace every 4-bit layer by a plain one that holds its dequantized weight, in the type of the products.

    These are the numbers that bitsandbytes dequantizes again for every product, so QLoRA's results stay the same. It
    saves that work and takes four times the memory.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = plain_layer(child, full_weight(child).to(child.compute_dtype))
                patches.replace_module(parent, name, plain)


def plain_layer(layer: torch.nn.Linear, weight: torch.Tensor) -> torch.nn.Linear:
    """A frozen linear layer with `weight` and the bias of `layer`."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain


def full_weight(layer: torch.nn.Module) -> torch.Tensor:
    """The values that a linear layer multiplies with, dequantized if needed: (out_features, in_features)."""
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        values: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return values
    assert isinstance(weight, torch.Tensor)
    return weight.data


@dataclass(frozen=True)
class FourBit:
    """How weights are held in 4 bits: `kind` is nf4 or fp4, and `nested` says whether the constants are quantized too."""

    kind: str
    nested: bool

    @classmethod
    def of(cls, settings: Settings) -> FourBit:
        return cls(settings.bnb_4bit_quant_type, settings.use_nested_quant)

    def values(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` after quantization and back, in its own type: bit for bit what bitsandbytes multiplies with."""
        packed, state = bnb.functional.quantize_4bit(
            weight.contiguous(), blocksize=_BLOCK, compress_statistics=self.nested, quant_type=self.kind
        )
        values: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
        return values

    def in_parts(self, weight: torch.Tensor, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor] | None:
        """A function that gives rows `first` to `last` of `values(weight.to(dtype))` in float32, on the CPU.

        None for shapes that cannot be split. It is some ten times as fast as quantizing with bitsandbytes 0.50, which
        looks for each value's place by bisection: here it is counted how many of the fifteen bounds lie below it. It
        also never packs the codes. Several threads may call it at once; what one was given holds until its next call.
        """
        if weight.dim() != 2 or weight.shape[1] % _BLOCK:
            return None
        weight = weight.contiguous()
        per_row = weight.shape[1] // _BLOCK
        constants = (
            self._nested(torch.cat([_largest(part.to(dtype).float()) for part in torch.split(weight, 64)]))
            if self.nested
            else None
        )

        def rows(first: int, last: int) -> torch.Tensor:
            scratch = _Scratch.of_this_thread((last - first) * per_row)
            own = scratch.own
            own.copy_(weight[first:last].view(-1, _BLOCK))
            if dtype != torch.float32:
                own.copy_(own.to(dtype))
            largest = own.abs().amax(1)
            held = largest if constants is None else constants[first * per_row : last * per_row]
            self._quantize_and_back(scratch, largest.numpy(), held.numpy())
            values = torch.from_numpy(scratch.values).view(last - first, weight.shape[1])
            return values if dtype == torch.float32 else values.to(dtype).float()

        return rows

    def _quantize_and_back(self, scratch: _Scratch, largest: Any, constants: Any) -> None:
        values, place, above = scratch.values, scratch.place, scratch.above
        scale = (1.0 / numpy.maximum(largest, numpy.float32(1e-38)))[:, None]
        numpy.multiply(scratch.own.numpy(), scale, out=values)
        bounds, codes = _codes(self.kind)
        place.fill(0)
        for bound in bounds:
            numpy.greater(values, bound, out=above)
            numpy.add(place, above.view(numpy.uint8), out=place)
        numpy.take(codes, place, out=values, mode="clip")  # "raise" would copy
        numpy.multiply(values, constants[:, None], out=values)

    @staticmethod
    def _nested(constants: torch.Tensor) -> torch.Tensor:
        """The constants after double quantization and back (QLoRA, section 3): 8 bits around their mean."""
        offset = constants.mean()
        packed, state = bnb.functional.quantize_blockwise(constants - offset, blocksize=256)
        held: torch.Tensor = bnb.functional.dequantize_blockwise(packed, state).float() + offset
        return held


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each block: shape (blocks,)."""
    return values.view(-1, _BLOCK).abs().amax(1)


class _Scratch:
    """Memory for a part of a weight, which a thread uses again: fresh memory costs as much as the arithmetic."""

    _threads = threading.local()

    def __init__(self, blocks: int) -> None:
        self.own = torch.empty(blocks, _BLOCK)
        self.values = numpy.empty((blocks, _BLOCK), numpy.float32)
        self.place = numpy.empty((blocks, _BLOCK), numpy.uint8)
        self.above = numpy.empty((blocks, _BLOCK), bool)

    @classmethod
    def of_this_thread(cls, blocks: int) -> _Scratch:
        found: _Scratch | None = getattr(cls._threads, "scratch", None)
        if found is None or len(found.own) != blocks:
            found = cls._threads.scratch = cls(blocks)
        return found


@functools.cache
def _codes(kind: str) -> tuple[Any, Any]:
    """The sixteen values of a 4-bit type in ascending order, and the fifteen bounds between them."""
    values = numpy.sort(bnb.functional.get_4bit_type(kind, device="cpu").numpy())
    return (values[:-1] + values[1:]) / 2, values
