"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by peft."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from job.errors import InputError
from job.run import Run
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


def keep_full_precision(model: PeftModel, dtype: torch.dtype, *, sharded: bool) -> None:
    """Hold the adapter in float32 unless products are in bfloat16.

    trl casts the adapter of a 4-bit model to bfloat16. Beside float32 activations (the CPU) that only loses digits, and
    CPUs without bfloat16 instructions multiply it ten times slower; float16 mixed precision needs float32 to scale.
    Shards are cast when they are gathered, and torch's AdamW keeps its moments in the type of what it is given.
    """
    if dtype != torch.bfloat16 or sharded:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def with_adapter(run: Run, base: PreTrainedModel) -> PeftModel:
    """`base` with the trained adapter, ready to answer; `disable_adapter()` gives the base's own answers."""
    folder: Path = run.paths.adapter_dir
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    # peft only warns of a file that fits no layer, and the base would pass for what was trained
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        differing = set(stored.keys()) ^ set(get_peft_model_state_dict(model))
    if differing:
        raise InputError(f"The trained adapter does not fit its model: {min(differing)}, ….", "This is a bug.")
    model.eval()
    return model
