"""Decoder layers compiled by torch.compile."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch._inductor import config as inductor_config

from job.errors import InputError


def compile_layers(model: PeftModel) -> None:
    """Compile each decoder layer in place, with one program for all layers and batches of any length.

    Raises InputError if the model has no list of layers.
    """
    torch._dynamo.config.cache_size_limit = 64
    # It keeps headers in a folder of /tmp that anybody may have made, whatever TORCHINDUCTOR_CACHE_DIR says.
    inductor_config.cpp_cache_precompile_headers = False
    layers = getattr(model.get_base_model().base_model, "layers", None)
    if layers is None:
        raise InputError(
            "FT_DECODER_LAYERS=compiled, but this model has no decoder layers to compile.",
            "Set FT_DECODER_LAYERS=auto, which trains the model as it is.",
        )
    for layer in layers:
        layer.compile(dynamic=True)
