"""New tokens: rows that embedding and head get for them."""

from __future__ import annotations

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel


@torch.no_grad()
def grow(model: PreTrainedModel, tokens: int) -> None:
    """Give embedding and head at least `tokens` rows. New ones begin as the mean of the others, the same on every machine."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens <= rows:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and not layer.weight.is_meta:
            layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)


def trained_rows(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]] | list[int] | None:
    """peft's `trainable_token_indices` for the tokens `ids`: of embedding and head, or of the one matrix that is both."""
    if not ids:
        return None
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return ids if tied else {"embed_tokens": ids, "lm_head": ids}


def give_heads_a_bias(model: torch.nn.Module) -> None:
    """trl reads the head's weight and bias instead of calling it. peft's layer with trained rows has a weight, but no bias."""
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and isinstance(module.original_module, torch.nn.Linear):
            object.__setattr__(module, "bias", module.original_module.bias)
