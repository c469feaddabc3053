"""The job's settings as trl's SFTConfig."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from job.model.compute import Compute
from job.model.device import mixed_precision
from job.settings import Settings
from job.training.sharding import sharding_arguments

_NEVER = 2**31 - 1


def training_arguments(
    settings: Settings,
    compute: Compute,
    *,
    output_dir: Path,
    run_name: str,
    max_length: int,
    evaluates: bool,
    resumed: bool,
    recomputes: bool,
) -> SFTConfig:
    """Arguments for training on prepared data: rows are already tokenized, labeled, cut and packed.

    Raises TypeError if the installed trl does not know one of them.
    """
    on_gpu = compute.on_gpu
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "run_name": run_name,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "per_device_eval_batch_size": settings.per_device_eval_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": recomputes,
        "max_grad_norm": settings.max_grad_norm,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "optim": settings.optim if on_gpu and settings.sharding == "none" else _plain_optimizer(settings.optim),
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a fraction of all steps
        "train_sampling_strategy": "group_by_length" if settings.group_by_length and not settings.packing else "random",
        "seed": settings.seed,
        **mixed_precision(settings, compute.dtype),
        # the data is prepared already
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None if compute.padding_free else max_length,
        "padding_free": compute.padding_free,
        "packing": settings.packing,
        "eval_packing": False,
        # evaluation, checkpoints, logs
        "eval_strategy": "steps" if evaluates and settings.eval_steps else "no",
        "eval_steps": settings.eval_steps,
        "eval_on_start": evaluates and not resumed,
        "save_strategy": "steps",
        "save_steps": _NEVER if settings.save_steps == "auto" else settings.save_steps,  # and after the last step
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen, not averaged away
        "report_to": ["tensorboard", *(["wandb"] if os.environ.get("WANDB_API_KEY") else [])],
        "disable_tqdm": True,
        "use_cpu": not on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},  # copying a batch need not wait for the step before it
        "ddp_find_unused_parameters": False,
        **sharding_arguments(settings),
        **settings.extra_training_args,
    }
    known = {field.name for field in fields(SFTConfig)}
    missing = sorted(set(arguments) - known)
    if missing:  # another version of transformers or trl: fail rather than train differently
        raise TypeError(f"SFTConfig of the installed trl does not support {', '.join(missing)}")
    return SFTConfig(**arguments)


def _plain_optimizer(name: str) -> str:
    """Replace bitsandbytes' optimizers, which need a GPU to page their state and do not support shards.

    Plain AdamW takes the same steps.
    """
    return "adamw_torch" if name.startswith("paged_") or "8bit" in name else name


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that torch has allocated on the GPU. None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def allocator_retries(device: torch.device) -> int | None:
    """How often torch's allocator found no memory, returned its unused blocks and retried. None on the CPU.

    Each retry waits for the GPU. Many retries mean that the plan is too tight for the card.
    """
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else None
