"""Compiled decoder layers."""

from __future__ import annotations

import torch
from peft import PeftModel

from job.errors import InputError


def compile_layers(model: PeftModel) -> None:
    """Compile each decoder layer in place: one program for all of them, for batches of any length."""
    torch._dynamo.config.cache_size_limit = 64
    layers = getattr(model.get_base_model().base_model, "layers", None)
    if layers is None:
        raise InputError(
            "FT_DECODER_LAYERS=compiled finds no layers in this model.",
            "Leave it at auto: the model is trained as it is.",
        )
    for layer in layers:
        layer.compile(dynamic=True)
