"""The device of this process, what it supports, and the types that follow from that."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from job.errors import NodeError
from job.gpus import driver_problem
from job.settings import Settings

STARTED_WITH = "JOB_COMPUTE_DTYPE"  # in a stage's environment: the type in which the run computes since its first start


def device_of(settings: Settings, local_rank: int) -> torch.device:
    """The device of this process. Raises NodeError if a GPU was asked for and there is none."""
    if settings.device == "cpu":
        return torch.device("cpu")
    problem = driver_problem(torch.version.cuda)
    if problem is not None:
        raise NodeError(
            f"FT_DEVICE=cuda, but {problem}.",
            "Use a machine with a newer driver or card, update the driver, or build the image for CUDA 12.8 (drivers from 525 on, "
            "docs/operations.md).",
        )
    if not torch.cuda.is_available():
        raise NodeError(
            "FT_DEVICE=cuda, but torch sees no GPU on this machine.",
            "Start the container with GPUs (docker run --gpus all, nvidia.com/gpu in the pod), check the driver with nvidia-smi, "
            "or set FT_DEVICE=cpu to train on the CPU, which is slow.",
        )
    return torch.device("cuda", local_rank)


def require_fp8(device: torch.device) -> None:
    """Raise NodeError unless the GPU multiplies 8-bit floats, which FT_FROZEN_PRECISION=fp8 needs."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise NodeError(
            f"FT_FROZEN_PRECISION=fp8, but the {torch.cuda.get_device_name(device)} does not support 8-bit floats.",
            "Rent an L4, L40S, H100, H200 or B200, or unset FT_FROZEN_PRECISION.",
        )


def can_compile_kernels() -> bool:
    """Whether Triton and what its launchers need are installed, and no kernel has crashed a process of this start."""
    if without_kernels():
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return importlib.util.find_spec("triton") is not None and compiler is not None and headers


def without_kernels() -> bool:
    """Whether one of our own kernels crashed an earlier process of this start."""
    return os.environ.get("JOB_WITHOUT_KERNELS") == "1"


def is_alive(device: torch.device) -> bool:
    """Whether the GPU still answers. After a kernel crashed, it answers nothing in this process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the card is an H100, H200 or GH200, the kind on which our own kernels were measured."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def compute_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The type of matrix products, from FT_BNB_4BIT_COMPUTE_DTYPE and the device.

    A run keeps the type that it was started with, on whatever card it resumes: the loss scale and the roundings belong to
    it. Raises NodeError if this card cannot compute in it.
    """
    if settings.bnb_4bit_compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.bnb_4bit_compute_dtype)
        return dtype
    if device.type == "cpu":
        return torch.float32  # a CPU without bfloat16 instructions emulates them at a tenth of the speed
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    started_with = os.environ.get(STARTED_WITH) or ("bfloat16" if modern else "float16")
    if started_with == "bfloat16" and not modern:
        raise NodeError(
            f"This run computes in bfloat16 since its first start, which the {torch.cuda.get_device_name(device)} does not support.",
            "Use an Ampere GPU or newer (A10, A100, L4, RTX 30xx), or choose another FT_RUN_ID to train from the start on this one.",
        )
    return torch.float16 if started_with == "float16" else torch.bfloat16


def mixed_precision(settings: Settings, dtype: torch.dtype) -> dict[str, bool]:
    """The trainer's arguments `fp16` and `bf16`."""
    fp16 = dtype == torch.float16 if settings.fp16 == "auto" else settings.fp16
    bf16 = dtype == torch.bfloat16 if settings.bf16 == "auto" else settings.bf16
    return {"fp16": bool(fp16), "bf16": bool(bf16) and not fp16}
