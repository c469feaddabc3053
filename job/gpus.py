"""This machine's GPUs as their driver tells of them, without loading torch (NVML, docs.nvidia.com/deploy/nvml-api)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pynvml

_XID_WAIT_MILLISECONDS = 60_000


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as its driver reports it."""

    name: str
    memory_bytes: int


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


def gpu_states(environ: Mapping[str, str] = os.environ) -> dict[int, GpuState]:
    """The state of each GPU that this job may use, by the driver's number. Empty without a driver."""
    with contextlib.suppress(pynvml.NVMLError), _cards() as cards:
        return {int(pynvml.nvmlDeviceGetIndex(card)): _state(card) for card in _visible(cards, environ)}
    return {}


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
        if not all_cards:
            return None
        driver, supported = str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        if supported // 1000 < cuda[0]:
            return (
                f"driver {driver} supports CUDA {supported // 1000}.{supported % 1000 // 10}, "
                f"and this build (CUDA {build}) needs driver {oldest_driver} or newer"
            )
        if not (cards := _visible(all_cards, environ)):  # or a slice of a card (MIG), which NVML's list does not have
            return None
        newest = max(cards, key=_capability)
        if _capability(newest) < oldest_card:
            return (
                f"the {pynvml.nvmlDeviceGetName(newest)} has compute capability {'.'.join(map(str, _capability(newest)))}, "
                f"and this build (CUDA {build}) needs {oldest_card[0]}.{oldest_card[1]} or newer"
            )
    return None


def _capability(card: Any) -> tuple[int, ...]:
    return tuple(map(int, pynvml.nvmlDeviceGetCudaComputeCapability(card)))
