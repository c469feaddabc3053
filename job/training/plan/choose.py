"""Which way the steps of this process are to be computed, by the settings, the model, the data and the GPU."""

from __future__ import annotations

import math
import os

import torch

from job.errors import InputError
from job.model.device import can_compile_kernels, device_of, require_fp8, without_kernels
from job.report.events import message
from job.run import Run, read_json
from job.settings import Settings
from job.training.plan.candidates import Plan, choose, plans, smaller_plan
from job.training.plan.cards import GIB, Card, card_named
from job.training.plan.load import Shape, load_of, obstacle

_UNKNOWN_CARD = Card("unknown", 0, 100e12, 1e12)  # of two plans the same is faster on most


def decide(run: Run) -> tuple[Shape | None, Plan | None]:
    """The model's shape and the fastest plan that fits; None for both where transformers and peft compute the layers. InputError for
    what is asked for and cannot be."""
    settings, device = run.settings, device_of(run)
    asked = is_asked_for(settings)
    if settings.decoder_layers in ("plain", "compiled") or (device.type == "cpu" and not asked):
        return None, None
    shape = Shape.of(read_json(run.paths.model_dir / "config.json"), settings)
    reason = _obstacle(run, device, shape)
    if reason is not None:
        if asked:
            named = "FT_DECODER_LAYERS=fused" if settings.decoder_layers == "fused" else "FT_FROZEN_PRECISION=fp8"
            raise InputError(f"{named} cannot be: {reason}.", "Leave it at its default.")
        if run.node.is_first:
            message(f"The layers are computed by transformers and peft, which is slower: {reason}.", "warning")
        return None, None
    assert shape is not None
    if settings.frozen_precision == "fp8":
        require_fp8(device)
    card, free = _UNKNOWN_CARD, float("inf")
    if device.type == "cuda":
        card = card_named(torch.cuda.get_device_name(device)) or card
        free = free_bytes(settings, device)
    report = read_json(run.paths.data_report_file)
    load = load_of(report, settings)
    plan = choose(list(plans(shape, load, card, settings)), free)
    for _ in range(int(os.environ.get("JOB_PLAN_STEPS_DOWN", "0"))):
        plan = smaller_plan(plan, shape, settings) or plan
    if run.node.is_first:
        told = f"Plan: {plan.described(shape.layers)}"
        if device.type == "cuda":
            told += f"; predicted {plan.memory_bytes / GIB:.1f} of {free / GIB:.1f} GiB"
            if card is not _UNKNOWN_CARD:
                told += f", {load.mean_batch / plan.seconds:,.0f} tokens/s a GPU"
        message(f"{told}.")
    return shape, plan


def is_asked_for(settings: Settings) -> bool:
    """Whether the fused layers are not only the default, so that another way would not be what the settings say."""
    return settings.decoder_layers == "fused" or settings.frozen_precision == "fp8"


def _obstacle(run: Run, device: torch.device, shape: Shape | None) -> str | None:
    """What the fused layers do not know, of the settings, the model and this machine."""
    if without_kernels():
        return "a kernel of the job's own ended in a fault of this GPU"
    reason = obstacle(run.settings, shape)
    if reason is not None:
        return reason
    if device.type == "cpu":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "their attention needs a GPU from Ampere on"
    if not can_compile_kernels():
        return "Triton, which compiles their kernels, is not installed or lacks gcc or Python's headers (python3-dev)"
    return None


def limit_memory(settings: Settings, device: torch.device) -> None:
    """Let this process take no more of the GPU than FT_GPU_MEMORY_GIB."""
    if device.type == "cuda" and settings.gpu_memory_gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gpu_memory_gib * GIB / total), device)


def free_bytes(settings: Settings, device: torch.device) -> float:
    """What this process may take of the GPU, the weights that it holds already among it."""
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)
    return min(float(free), math.inf if settings.gpu_memory_gib is None else settings.gpu_memory_gib * GIB)
