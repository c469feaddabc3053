"""Loading the base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import InputError
from job.model.compute import Compute
from job.model.safetensors_files import Weights
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
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
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
    _require_whole(settings, model, report)
    if not compute.on_gpu and getattr(model, "is_quantized", False):
        from job.model.quantization import keep_plain_layout

        keep_plain_layout(model)
    grow(model, tokens)
    return model


def _require_whole(settings: Settings, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise InputError if transformers filled in random numbers for weights that the files lack, about which it only warns."""
    lacking = sorted(map(str, (*report.get("missing_keys", ()), *report.get("mismatched_keys", ()))))
    if lacking:
        more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        raise InputError(
            f"FT_MODEL_NAME={settings.model_name}: its files lack {lacking[0]}{more}, which its config.json asks for.",
            "Weights and config.json must belong together, and the weights be named as transformers names them.",
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        head is not None
        and getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        and head.weight.data_ptr() != embedding.weight.data_ptr()
        and not torch.equal(head.weight, embedding.weight.to(head.weight.device))
    ):
        raise InputError(
            f"FT_MODEL_NAME={settings.model_name}: config.json says that head and embeddings are the same (tie_word_embeddings), "
            "and the files hold two that differ.",
            "Set tie_word_embeddings to false in config.json, or remove the weight of the head.",
        )


def _quantization(settings: Settings, compute: Compute) -> Any:
    from job.model.quantization import four_bit_config  # imports bitsandbytes, which takes a second

    return four_bit_config(settings, compute.dtype)


def stored_dtype(folder: Path) -> torch.dtype:
    """The type of a model folder's weights according to its config.json, or if that does not say, to the first of them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [config, config.get("text_config") or {}]
    named = next((name for part in parts for name in (part.get("dtype"), part.get("torch_dtype")) if name), None)
    if named is not None:
        return cast(torch.dtype, getattr(torch, named))
    stored = Weights(folder)
    types = (stored[name].dtype for name in stored)
    return next((dtype for dtype in types if dtype in (torch.float32, torch.float16, torch.bfloat16)), torch.bfloat16)


def _device_map(settings: Settings, device: torch.device) -> Any:
    if settings.device_map == "auto":
        return {"": device}
    return json.loads(settings.device_map) if settings.device_map.startswith("{") else settings.device_map
