"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) by peft."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

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


def adapter_dtype(settings: Settings, products: torch.dtype) -> torch.dtype:
    """The type in which the adapter is held and trained, beside products in another.

    bfloat16 for 4-bit models, as trl has it. Float32 beside float32 products (the CPU), where bfloat16 would only lose digits;
    beside float16 ones, whose scaled gradients need it; and in shards, which are cast when they are gathered, while torch's
    AdamW keeps its moments in the type of what it is given.
    """
    whole_bfloat16 = products == torch.bfloat16 and settings.use_4bit and settings.sharding == "none"
    return torch.bfloat16 if whole_bfloat16 else torch.float32


def hold_adapter_in(model: PeftModel, dtype: torch.dtype) -> None:
    """Cast what is trained; peft and trl decide by whether the frozen layers look like 4-bit ones."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def with_adapter(run: Run, base: PreTrainedModel) -> PeftModel:
    """`base` with the trained adapter, ready to answer; `disable_adapter()` gives the base's own answers."""
    folder: Path = run.paths.adapter_dir
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    model.eval()
    return model
