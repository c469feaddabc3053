"""How fast the nodes of a run exchange gradients, measured for a second before the training.

A network whose fast path is missing (no RDMA device in the pod, a library that is absent, the wrong interface) still works, ten
times as slowly and without a word.
"""

from __future__ import annotations

import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from job.cluster import Node
from job.report.events import message

_SECONDS = 1.0
_BYTES = {"cuda": 2**28, "cpu": 2**22}
_ENOUGH = 0.5  # of what the links give
_CAP_IPC_LOCK = 14


@dataclass(frozen=True)
class Link:
    """A network device that is up, and what it carries per second."""

    name: str
    bytes_per_second: float


def listen_to_nccl(folder: Path) -> None:
    """Let NCCL write to `folder` which network it chooses. Call this before the process group is made."""
    if "NCCL_DEBUG" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {
            "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(folder / "nccl-%h-%p.log"),
        }  # fmt: skip


def tell_network(node: Node, device: torch.device, folder: Path, system: Path = Path("/sys/class")) -> None:
    """Measure and report how fast gradients will be exchanged. All ranks must call this, and the first one reports."""
    rate = _rate(node.world_size, device)
    if not node.is_first:
        return
    links, chosen = links_of(system), chosen_network(folder)
    expected = expected_rate(links)
    through = f" through NCCL's {chosen} network" if chosen else ""
    told = f"{node.count} nodes exchange gradients at {rate / 1e9:.2f} GB/s{through}"
    if expected is None:
        message(f"{told}.")
        return
    names = ", ".join(f"{link.name} {link.bytes_per_second / 1e9:.3g} GB/s" for link in links)
    if device.type == "cpu" or rate >= _ENOUGH * expected:
        message(f"{told}. This node's links: {names}.")
        return
    hint = "Look at NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
    if chosen == "Socket" and any(_is_rdma(link) for link in links):
        hint = "There are RDMA devices, and NCCL does not use them: is /dev/infiniband in the container?"
        if (limit := pinnable_bytes()) is not None:
            hint += f" And this process may pin only {limit >> 20} MiB of memory: it needs IPC_LOCK, as root, or ulimit -l unlimited."
    message(f"{told}, less than half of what this node's links give: {names}. {hint}", "warning")


def pinnable_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    """How much memory this process may lock, which RDMA needs. None if that is unlimited (mlock(2), capabilities(7)).

    In a pod only root has the capabilities that its manifest adds.
    """
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(status), re.MULTILINE)
    if effective is not None and int(effective[1], 16) >> _CAP_IPC_LOCK & 1:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit


def _rate(world_size: int, device: torch.device) -> float:
    """Bytes per second that each rank sends and receives in an all-reduce (NCCL's "bus bandwidth").

    In a ring of n ranks each sends 2 (n - 1) / n of the tensor, and as much passes each link between nodes.
    """
    values = torch.ones(_BYTES[device.type] // 4, device=device)
    _seconds(values, 2)  # connects the ranks
    rounds = torch.tensor([_SECONDS / max(_seconds(values, 2) / 2, 1e-4)], device=device)
    torch.distributed.all_reduce(rounds, torch.distributed.ReduceOp.MIN)
    count = max(1, min(200, int(rounds)))
    return values.numel() * 4 * 2 * (world_size - 1) / world_size * count / _seconds(values, count)


def _seconds(values: torch.Tensor, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - began


def links_of(system: Path) -> list[Link]:
    """The RDMA ports and network cards that are up, by Linux's files. Virtual devices have no speed of their own."""
    found = []
    for port in sorted(system.glob("infiniband/*/ports/*")):
        rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate"))  # such as "400 Gb/sec (4X NDR)"
        if rate is not None and "ACTIVE" in _read(port / "state"):
            found.append(Link(f"{port.parent.parent.name} (RDMA)", float(rate[1]) * 1e9 / 8))
    for card in sorted(system.glob("net/*")):
        speed = _read(card / "speed").strip()  # megabits per second, -1 if it is unknown
        if (card / "device").exists() and _read(card / "operstate").strip() == "up" and speed.isdigit():
            found.append(Link(card.name, int(speed) * 1e6 / 8))
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:  # the driver refuses to say it of a device that is down
        return ""


def expected_rate(links: list[Link]) -> float | None:
    """What the links give together: NCCL uses all RDMA ports, or else one network card."""
    rdma = [link.bytes_per_second for link in links if _is_rdma(link)]
    return sum(rdma) if rdma else max((link.bytes_per_second for link in links), default=None)


def _is_rdma(link: Link) -> bool:
    return link.name.endswith("(RDMA)")


def chosen_network(folder: Path) -> str | None:
    """The network that NCCL said last that it uses, such as IB or Socket. None if it said nothing."""
    for file in sorted(folder.glob("nccl-*.log"), key=lambda file: file.stat().st_mtime, reverse=True):
        found = re.search(r"NCCL INFO Using network (\S+)", file.read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            return found[1]
    return None
