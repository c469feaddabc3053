"""This process's place in the job, the machine's GPUs, and the run id if a scheduler provides one."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pynvml

_PR_SET_DUMPABLE = 4
_XID_WAIT_MILLISECONDS = 60_000


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


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its driver reports it."""

    name: str
    memory_bytes: int


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


@contextlib.contextmanager
def _cards() -> Iterator[list[Any]]:
    """The driver's handles of this machine's GPUs, an empty list without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


@dataclass(frozen=True)
class GpuState:
    """What a GPU does at this moment. None is what its driver does not tell, as of a MIG slice."""

    memory_used: int
    utilization: float | None  # of the time since the driver last looked, the part in which a kernel ran
    watts: float | None


def gpu_states() -> tuple[GpuState, ...]:
    """The state of each GPU that the driver shows us. Empty without a driver."""
    with contextlib.suppress(pynvml.NVMLError), _cards() as cards:
        return tuple(map(_state, cards))
    return ()


def _state(card: Any) -> GpuState:
    busy, milliwatts = (
        _told(ask, card) for ask in (pynvml.nvmlDeviceGetUtilizationRates, pynvml.nvmlDeviceGetPowerUsage)
    )
    return GpuState(
        memory_used=int(pynvml.nvmlDeviceGetMemoryInfo(card).used),
        utilization=None if busy is None else busy.gpu / 100,
        watts=None if milliwatts is None else milliwatts / 1000,
    )


def _told(ask: Callable[[Any], Any], card: Any) -> Any:
    try:
        return ask(card)
    except pynvml.NVMLError:
        return None


def watch_for_xids(on_xid: Callable[[int, int], None]) -> None:
    """Call `on_xid(gpu, xid)` in a thread for each error that the driver reports of a GPU from now on.

    The numbers are NVIDIA's (docs.nvidia.com/deploy/xid-errors). Nothing is reported without a driver, or by one that
    reports no such events.
    """
    threading.Thread(target=_wait_for_xids, args=(on_xid,), name="xid", daemon=True).start()


def _wait_for_xids(on_xid: Callable[[int, int], None]) -> None:
    with contextlib.suppress(pynvml.NVMLError), _cards() as cards:
        events, watched = pynvml.nvmlEventSetCreate(), False
        for card in _visible(cards, os.environ):
            with contextlib.suppress(pynvml.NVMLError_NotSupported):
                pynvml.nvmlDeviceRegisterEvents(card, pynvml.nvmlEventTypeXidCriticalError, events)
                watched = True
        while watched:
            try:
                event = pynvml.nvmlEventSetWait_v2(events, _XID_WAIT_MILLISECONDS)
            except pynvml.NVMLError_Timeout:
                continue
            on_xid(int(pynvml.nvmlDeviceGetIndex(event.device)), int(event.eventData))


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The NVIDIA GPUs this job may use, found without loading torch. Empty without a driver."""
    with _cards() as cards:
        return tuple(
            Gpu(name=str(pynvml.nvmlDeviceGetName(card)), memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(card).total))
            for card in _visible(cards, environ)
        )


def _visible(cards: list[Any], environ: Mapping[str, str]) -> list[Any]:
    """Those of the cards that CUDA_VISIBLE_DEVICES names, by number or by the start of their UUID. All if it is unset."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return cards
    uuids = [str(pynvml.nvmlDeviceGetUUID(card)) for card in cards]
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        matches = [cards[int(name)]] if name.isdigit() and int(name) < len(cards) else []
        matches += [card for card, uuid in zip(cards, uuids, strict=True) if uuid.startswith(name)]
        if not matches:  # CUDA, too, stops at the first name it does not recognize
            break
        chosen.append(matches[0])
    return chosen


# Builds for this CUDA or newer need this driver, as any of the same major version does (NVIDIA's release notes), and a card
# of this compute capability (NVIDIA's support matrix; for 12.8, what PyTorch 2.10 is compiled for).
_NEEDED = {(13, 0): (580, (7, 5)), (12, 8): (525, (7, 0)), (12, 0): (525, (5, 0))}


def cuda_build() -> str | None:
    """The CUDA that the installed torch was built for, such as `13.0`, without loading torch. None for a CPU build."""
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(name).split(".")[:2])
    return None


def driver_problem(build: str | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """Why this machine's driver, or all cards that this job may use, cannot run a torch that was built for CUDA `build`.
    None if they can.

    What the driver supports counts, not its number: NVIDIA's cuda-compat packages let older ones run newer CUDA.
    """
    cuda = tuple(map(int, (build or "0").split(".")))
    needed = next((needed for since, needed in _NEEDED.items() if since[0] == cuda[0] and since <= cuda), None)
    if needed is None:
        return None
    oldest_driver, oldest_card = needed
    with contextlib.suppress(pynvml.NVMLError), _cards() as all_cards:
        if not (cards := _visible(all_cards, environ)):
            return None
        driver, supported = str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        if supported // 1000 < cuda[0]:
            return (
                f"driver {driver} supports CUDA {supported // 1000}.{supported % 1000 // 10}, "
                f"and this build (CUDA {build}) needs driver {oldest_driver} or newer"
            )
        newest = max(cards, key=_capability)
        if _capability(newest) < oldest_card:
            return (
                f"the {pynvml.nvmlDeviceGetName(newest)} has compute capability {'.'.join(map(str, _capability(newest)))}, "
                f"and this build (CUDA {build}) needs {oldest_card[0]}.{oldest_card[1]} or newer"
            )
    return None


def _capability(card: Any) -> tuple[int, ...]:
    return tuple(map(int, pynvml.nvmlDeviceGetCudaComputeCapability(card)))


def is_in_container_layer(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether what is written to `folder` is part of the container, and so is lost when the container is removed."""
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    kinds = {line.split()[1]: line.split()[2] for line in lines if len(line.split()) > 2}
    for place in (folder.resolve(), *folder.resolve().parents):
        if str(place) in kinds:
            return kinds[str(place)] in ("overlay", "fuse-overlayfs")
    return False
