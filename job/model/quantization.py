"""4-bit weights with bitsandbytes (Dettmers et al. 2023, QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from job.model.patches import Patches
from job.settings import Settings


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
