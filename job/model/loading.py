"""Loading the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import InputError
from job.model.compute import Compute
from job.model.vocabulary import grow
from job.settings import Settings


def load_base(
    folder: Path,
    settings: Settings,
    compute: Compute,
    *,
    quantized: bool,
    attention: str | None = None,
    tokens: int = 0,
) -> PreTrainedModel:
    """Load the base model onto this process's device, with its frozen layers in 4 bits if `quantized`.

    Embedding and head get rows for at least `tokens` tokens.
    The attention is transformers' choice unless `attention` names one. Only safetensors are read, and only classes that
    ship with transformers are built. Raises InputError if the folder does not hold a model.
    """
    quantization = _quantization(settings, compute) if quantized else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute.dtype,
            device_map=_device_map(settings, compute.device),
            quantization_config=quantization,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise  # the machine is at fault, not the model
        raise InputError(
            f"FT_MODEL_NAME={settings.model_name} cannot be loaded: {error}",
            "It must be a causal language model that transformers supports.",
        ) from error
    if not compute.on_gpu and getattr(model, "is_quantized", False):
        from job.model.quantization import keep_plain_layout

        keep_plain_layout(model)
    grow(model, tokens)
    return model


def _quantization(settings: Settings, compute: Compute) -> Any:
    from job.model.quantization import four_bit_config  # imports bitsandbytes, which takes a second

    return four_bit_config(settings, compute.dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a model folder's weights according to its config.json, or bfloat16 if that does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device_map(settings: Settings, device: torch.device) -> Any:
    if settings.device_map == "auto":
        return {"": device}
    return json.loads(settings.device_map) if settings.device_map.startswith("{") else settings.device_map
