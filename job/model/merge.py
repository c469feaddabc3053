"""Merging an adapter into the weights that it was trained on, and verifying that nothing else changed.

A QLoRA adapter has learned to correct the *4-bit* base. Merging it into the original 16-bit weights, as is common,
gives a model that nobody trained. Here W' = dequantized(W) + (alpha / r) · B·A, computed in float32 and rounded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from job.model import generation
from job.model.quantization import full_weight

ADAPTER = "default"


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: the name of its weight in the merged model, the layer itself, and its LoRA scale."""

    weight_name: str
    module: LoraLayer
    scale: float


def adapted_layers(model: PeftModel) -> Iterator[Layer]:
    """Every layer that the adapter changes."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield Layer(f"{name}.weight", module, float(module.scaling[ADAPTER]))


@torch.no_grad()
def merged_weight(layer: Layer) -> torch.Tensor:
    """W + scale · B·A in float32, shape (out_features, in_features)."""
    weight = full_weight(layer.module.get_base_layer()).float()
    a, b = layer.module.lora_A[ADAPTER].weight.float(), layer.module.lora_B[ADAPTER].weight.float()
    return torch.addmm(weight, b, a, alpha=layer.scale)


_CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate")  # name code that a loader may run


def write_merged(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Save base and adapter as one plain model in `dtype`: safetensors that transformers loads without peft."""
    base = model.get_base_model()
    config = AutoConfig.from_pretrained(base.config.name_or_path, trust_remote_code=False)
    config.dtype = dtype
    for name in _CODE_FIELDS:
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):  # only names and shapes, no memory
        plain: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(
        {name: value.to(dtype).cpu() for name, value in _merged_state(model)}, strict=False, assign=True
    )
    plain.tie_weights()
    left_out = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if left_out:
        raise RuntimeError(f"the trained model has no {', '.join(left_out)}")
    if base.generation_config is not None:
        plain.generation_config = generation.published(base)
    plain.save_pretrained(folder, max_shard_size="4GB")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only the owner can read


def _merged_state(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the plain model under its plain name, without peft's own parts."""
    adapted = {layer.weight_name: layer for layer in adapted_layers(model)}
    for name, module in model.get_base_model().named_modules():
        if ".lora_" in name or ".base_layer" in name:
            continue
        if f"{name}.weight" in adapted:
            layer = adapted[f"{name}.weight"]
            yield f"{name}.weight", merged_weight(layer)
            bias = layer.module.get_base_layer().bias
            if bias is not None:
                yield f"{name}.bias", bias.data
            continue
        for local, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{local}" if name else local, full_weight(module) if local == "weight" else parameter.data


@torch.no_grad()
def largest_difference(model: PeftModel, folder: Path) -> tuple[str, float]:
    """Read the merged weights back from disk and compare each adapted layer with the trained one.

    Returns the layer that differs most and its ‖W'_disk − W'‖ / ‖W'‖. Rounding to bfloat16 alone stays below 2^-8.
    """
    differences: dict[str, float] = {}
    for layer in adapted_layers(model):
        expected = merged_weight(layer)
        stored = read_tensor(folder, layer.weight_name).to(expected.device).float()
        difference = float((stored - expected).norm() / expected.norm())
        differences[layer.weight_name] = math.inf if math.isnan(difference) else difference
    return max(differences.items(), key=lambda item: item[1])


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors model, sharded or not."""
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text(encoding="utf-8"))["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(str(folder / file), framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


@torch.inference_mode()
def next_token_distributions(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the next token after every token of each row: (len(row), vocabulary), float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    logits = (model(input_ids=torch.tensor([list(row)], device=device)).logits[0] for row in rows)
    return [torch.log_softmax(row.float(), -1).cpu() for row in logits]


def compare_distributions(trained: Sequence[torch.Tensor], merged: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the merged model differs: mean and largest KL(trained ‖ merged) in nats/token, and top-1 agreement."""
    p, q = torch.cat(list(trained)), torch.cat(list(merged))
    divergence = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).float()
    return {
        "mean_kl_nats": float(divergence.mean()),
        "max_kl_nats": float(divergence.max()),
        "same_first_choice": float(same.mean()),
    }
