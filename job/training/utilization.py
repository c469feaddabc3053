"""How much of the card's arithmetic the training uses."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

# Dense bfloat16 (float16 where there is none) tensor peak in FLOP/s, from the vendor's data sheets; the first name that
# the card's own contains counts.
_PEAKS = (
    ("B200", 2.25e15), ("H200", 989e12), ("GH200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("A100", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("A10G", 70e12), ("A10", 125e12), ("A6000", 155e12),
    ("4090", 165e12), ("3090", 71e12), ("V100", 125e12), ("T4", 65e12),
)  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """What the card's data sheet promises, in FLOP/s; None for the CPU and for cards that are not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAKS if known in name), None)


def useful_flops_per_token(model: PreTrainedModel) -> float:
    """FLOPs that one token's training needs, attention's scores and recomputation left out.

    Two for each weight that is multiplied with in the forward pass, two for the gradient of its input, and two more for its
    own gradient where it is trained (Kaplan et al. 2020, arXiv:2001.08361, less what a frozen weight does not need).
    """
    frozen = trained = 0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):  # bitsandbytes' are, peft's wrappers around them are not
            continue
        count = module.in_features * module.out_features
        if module.weight.requires_grad:
            trained += count
        else:
            frozen += count
    return 4.0 * frozen + 6.0 * trained
