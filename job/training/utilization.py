"""How much of the card's peak arithmetic the training uses."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from job.training.plan.cards import card_named


def peak_flops(device: torch.device) -> float | None:
    """The card's dense 16-bit FLOP/s by its data sheet. None for the CPU and for cards that are not listed."""
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.peak_flops if card is not None else None


def useful_flops_per_token(model: PreTrainedModel) -> float:
    """FLOPs that training needs per token, without attention scores and recomputation.

    Each weight of a product takes two in the forward pass and two for its input's gradient. A trained weight takes two
    more for its own gradient (Kaplan et al. 2020, arXiv:2001.08361, minus what frozen weights do not need).
    """
    frozen = trained = 0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):  # bitsandbytes' layers are, but peft's wrappers are not
            continue
        count = module.in_features * module.out_features
        if module.weight.requires_grad:
            trained += count
        else:
            frozen += count
    return 4.0 * frozen + 6.0 * trained
