"""This process's place in the job and on its machine, and the run id if a scheduler provides one."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_PR_SET_DUMPABLE = 4


@dataclass(frozen=True, kw_only=True)
class Node:
    """This machine's place among those that train together, and this process's rank as set by torchrun.

    A process that torchrun did not start has `rank` 0, `local_rank` 0 and `world_size` 1.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    ends_at: float | None = None  # seconds since the epoch, if the scheduler sets a time limit

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of all, the only one that writes results."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this machine is the first, the only one that writes to the store, merges and publishes."""
        return self.index == 0


def this_node(
    nnodes: int | Literal["auto"] = "auto",
    node_rank: int | Literal["auto"] = "auto",
    environ: Mapping[str, str] = os.environ,
) -> Node:
    """Read this process's place from Slurm, Kubernetes and torchrun. `nnodes` and `node_rank` override the schedulers.

    Raises ValueError, with a sentence for the user, if the place is unknown or impossible.
    """
    in_step = "SLURM_STEP_NUM_NODES" in environ  # under srun. The batch script itself runs on only one node
    count = nnodes if nnodes != "auto" else int(environ["SLURM_STEP_NUM_NODES"]) if in_step else 1
    if nnodes == "auto" and not in_step and "JOB_COMPLETION_INDEX" in environ:
        raise ValueError(
            "FT_NNODES is not set in a pod of an Indexed Job: set it to the Job's completions, or to 1 if each pod trains alone."
        )
    index = node_rank
    if index == "auto":
        told = environ.get("SLURM_NODEID") if in_step else environ.get("JOB_COMPLETION_INDEX")
        if told is None and count > 1:
            raise ValueError(
                f"FT_NNODES={count} needs FT_NODE_RANK: neither Slurm nor an Indexed Job provides this node's rank."
            )
        index = int(told or 0) if count > 1 else 0
    if index >= count:
        hint = " Set FT_NNODES, the number of nodes, too." if nnodes == "auto" else ""
        raise ValueError(f"FT_NODE_RANK={index}: must be less than FT_NNODES={count}. The first node has rank 0.{hint}")
    ends_at = environ.get("SLURM_JOB_END_TIME", "")
    return Node(
        index=index,
        count=count,
        rank=int(environ.get("RANK", 0)),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        world_size=int(environ.get("WORLD_SIZE", 1)),
        ends_at=float(ends_at) if ends_at.isdigit() else None,
    )


def time_limit(environ: Mapping[str, str] = os.environ) -> float | None:
    """When the scheduler's time limit is, in seconds since the epoch, as it was last asked. None if nobody asks."""
    try:
        return float(Path(environ["JOB_END_TIME_FILE"]).read_text(encoding="ascii"))
    except (KeyError, OSError, ValueError):
        return None


def keep_private() -> None:
    """Keep other processes of this user from reading this one's memory and environment, which hold secrets (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """The scheduler's name for this machine, for people and for `sbatch --exclude`."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address() -> str:
    """An address at which other machines of the cluster reach this one.

    The address of the interface with the default route comes first. The host name may be unknown to other machines, or
    resolve to a loopback address (Debian's /etc/hosts). No packet is sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: reserved for documentation, so nobody has it
            return str(probe.getsockname()[0])
        except OSError:  # no default route
            return socket.gethostname()


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def scheduler_run_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """A run id from the Slurm job, one per array element and the same after a requeue. None outside Slurm."""
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"slurm-{environ['SLURM_ARRAY_JOB_ID']}-{environ['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else None


def is_in_container_layer(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether what is written to `folder` is part of the container, and so is lost when the container is removed."""
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    kinds = {line.split()[1]: line.split()[2] for line in lines if len(line.split()) > 2}
    for place in (folder.resolve(), *folder.resolve().parents):
        if str(place) in kinds:
            return kinds[str(place)] in ("overlay", "fuse.fuse-overlayfs")
    return False
