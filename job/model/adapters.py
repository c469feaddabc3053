"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), built by peft."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from job.errors import InputError
from job.settings import Settings


def lora_config(settings: Settings) -> LoraConfig:
    """The FT_LORA_* settings as peft's LoraConfig."""
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
    """Cast the trained parameters to `dtype`. peft and trl choose theirs by whether frozen layers look 4-bit."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def with_adapter(folder: Path, base: PreTrainedModel) -> PeftModel:
    """`base` with the adapter in `folder`, in evaluation mode. `disable_adapter()` gives the base's own answers.

    Raises InputError if the adapter does not fit the model.
    """
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    # peft only warns about a file that fits no layer, and the base would then pass for the trained model
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        differing = set(stored.keys()) ^ set(get_peft_model_state_dict(model))
    if differing:
        raise InputError(f"The trained adapter does not fit its model: {min(differing)}, ….", "This is a bug.")
    model.eval()
    return model
