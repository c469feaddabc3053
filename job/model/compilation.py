"""Compiled decoder layers."""

from __future__ import annotations

import torch
from peft import PeftModel


def compile_layers(model: PeftModel) -> None:
    """Compile each decoder layer in place: one program for all of them, for batches of any length."""
    torch._dynamo.config.cache_size_limit = 64
    for layer in model.get_base_model().model.layers:
        layer.compile(dynamic=True)
