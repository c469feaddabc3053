"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by peft."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from job.errors import InputError
from job.settings import Settings


def lora_config(settings: Settings) -> LoraConfig:
    """The FT_LORA_* settings as peft wants them."""
    targets: str | list[str] | None
    if settings.lora_target_modules == "auto":
        targets = None
    elif settings.lora_target_modules == "all-linear":
        targets = "all-linear"
    else:
        targets = list(settings.lora_target_modules)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )


def hold_adapter_in(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast what is trained; peft and trl decide by whether the frozen layers look like 4-bit ones."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def with_adapter(folder: Path, base: PreTrainedModel) -> PeftModel:
    """`base` with the adapter in `folder`, ready to answer; `disable_adapter()` gives the base's own answers."""
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    # peft only warns of a file that fits no layer, and the base would pass for what was trained
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        differing = set(stored.keys()) ^ set(get_peft_model_state_dict(model))
    if differing:
        raise InputError(f"The trained adapter does not fit its model: {min(differing)}, ….", "This is a bug.")
    model.eval()
    return model
