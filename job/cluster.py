"""Who am I: this process's place among the processes of the job, and the run's name where a scheduler gives one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True, kw_only=True)
class Node:
    """This process's rank, as torchrun set it; (0, 0, 1) for a process that torchrun did not start."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    ends_at: float | None = None  # seconds since the epoch, where the scheduler sets a limit

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card as its driver reports it."""

    name: str
    memory_bytes: int


def this_node(environ: Mapping[str, str] = os.environ) -> Node:
    """Read the variables that torchrun sets for each of its processes, and Slurm's end of the job."""
    ends_at = environ.get("SLURM_JOB_END_TIME", "")
    return Node(
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
        ends_at=float(ends_at) if ends_at.isdigit() else None,
    )


def scheduler_run_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The Slurm job's id, one per array element and the same after a requeue; None outside Slurm."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"slurm-{environ['SLURM_ARRAY_JOB_ID']}-{environ['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else None


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The NVIDIA GPUs this job may use, without loading torch; empty where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        gpus = [
            Gpu(
                name=str(pynvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(gpus)
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        matches = [gpus[int(name)]] if name.isdigit() and int(name) < len(gpus) else []
        matches += [gpu for gpu, uuid in zip(gpus, uuids, strict=True) if uuid.startswith(name)]
        if not matches:  # CUDA itself stops at the first name it does not know
            break
        chosen.append(matches[0])
    return tuple(chosen)
