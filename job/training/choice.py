"""The choice of how this process computes its steps, made once from the settings, the model, the data and the GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from job.errors import InputError
from job.model.compute import Compute
from job.model.device import can_compile_kernels, require_fp8, without_kernels
from job.settings import Settings
from job.training.captured import can_capture
from job.training.plan.candidates import Plan, plans
from job.training.plan.cards import GIB, Card, card_named
from job.training.plan.choose import choose, smaller_plan
from job.training.plan.load import Shape, load_of, obstacle

UNKNOWN_CARD = Card("unknown", 0, 100e12, 1e12)  # which of two plans is faster hardly depends on the card


@dataclass(frozen=True)
class Choice:
    """What steps are computed on, and by which plan. Without a plan, transformers and peft compute the layers.

    `reason` is a sentence for the user, or None if there is nothing to say. `slower` says whether it is a warning.
    """

    compute: Compute
    shape: Shape | None = None
    plan: Plan | None = None
    card: Card = UNKNOWN_CARD
    reason: str | None = None
    slower: bool = False


def choose_steps(
    settings: Settings, compute: Compute, config: Mapping[str, Any], data_report: Mapping[str, Any]
) -> Choice:
    """Choose the fastest plan that fits this process's GPU, for the model's config.json and the prepared data.

    Raises InputError if the settings ask for something that is not possible in this run.
    """
    asked = is_asked_for(settings)
    if settings.decoder_layers in ("plain", "compiled") or (not compute.on_gpu and not asked):
        return Choice(compute)
    load = load_of(data_report, settings)
    reason = _obstacle(settings, compute.device, config, load.longest_row)
    if reason is not None:
        if asked:
            named = "FT_DECODER_LAYERS=fused" if settings.decoder_layers == "fused" else "FT_FROZEN_PRECISION=fp8"
            raise InputError(f"{named} is not possible. {_CANNOT}: {reason}.", "Leave it at its default.")
        return Choice(compute, reason=f"{SLOWER}. {_CANNOT}: {reason}.", slower=True)
    shape = Shape.of(config, settings)
    if settings.frozen_precision == "fp8":
        require_fp8(compute.device)
    card, free = UNKNOWN_CARD, float("inf")
    if compute.on_gpu:
        card = card_named(torch.cuda.get_device_name(compute.device)) or card
        free = free_bytes(settings, compute.device)
    plan = choose(list(plans(shape, load, card, settings)), free)
    if not can_capture(compute.device):
        plan = replace(plan, captured_tokens=0)
    for _ in range(int(os.environ.get("JOB_PLAN_STEPS_DOWN", "0"))):
        plan = smaller_plan(plan, shape, settings, card) or plan
    told = f"Plan: {plan.described(shape.layers)}"
    if compute.on_gpu:
        told += f". Predicted: {plan.memory_bytes / GIB:.1f} of {free / GIB:.1f} GiB"
        if card is not UNKNOWN_CARD:
            told += f", {load.mean_batch / plan.seconds:,.0f} tokens/s per GPU"
    return Choice(compute, shape, plan, card, f"{told}.")


SLOWER = "The layers are computed by transformers and peft, which is slower"
_CANNOT = "The job's own fused layers cannot be used here"


def is_asked_for(settings: Settings) -> bool:
    """Whether the settings ask for the fused layers explicitly, so that a fallback would not be what the user wants."""
    return settings.decoder_layers == "fused" or settings.frozen_precision == "fp8"


def _obstacle(settings: Settings, device: torch.device, config: Mapping[str, Any], longest_row: int) -> str | None:
    """Why settings, model or machine do not allow the fused layers for this run. None if they do."""
    if without_kernels():
        return "one of the job's own kernels crashed on this GPU"
    reason = obstacle(settings, config, longest_row)
    if reason is not None:
        return reason
    if device.type == "cpu":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "their attention needs an Ampere GPU or newer"
    if not can_compile_kernels():
        return "Triton, which compiles their kernels, is not installed, or gcc or Python's headers (python3-dev) are missing"
    return None


def limit_memory(settings: Settings, device: torch.device) -> None:
    """Limit this process to FT_GPU_MEMORY_GIB of the GPU's memory."""
    if device.type == "cuda" and settings.gpu_memory_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gib * GIB / total), device)


def free_bytes(settings: Settings, device: torch.device) -> float:
    """The bytes of GPU memory that this process may use, including the weights that it already holds."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    return min(float(free), math.inf if settings.gpu_memory_gib is None else settings.gpu_memory_gib * GIB)
