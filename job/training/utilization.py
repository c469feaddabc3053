"""How much of the card's arithmetic the training uses."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from job.training.plan.cards import card_named


def peak_flops(device: torch.device) -> float | None:
    """What the card's data sheet promises, in FLOP/s; None for the CPU and for cards that are not listed."""
    card = card_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return card.peak_flops if card is not None else None


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
