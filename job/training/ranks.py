"""The process group of the ranks that train together, set up so that no socket of it takes anything from strangers.

torch's own meeting point on one machine listens on every interface, and so does the store behind `env://`. On one node the
ranks meet in a file instead, and every listener is on loopback. On several nodes one store listens, on the address that
serves the others. Nothing is ever pickled between ranks: who could send a pickle could run code.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from job.cluster import Node, own_address

MEETING_FILE = "JOB_MEETING_FILE"  # set in a rank's environment: where the ranks of one node meet
_SILENT_SECONDS = 1800  # transformers' default for a collective operation
_MEET_SECONDS = 900  # every node is ready, but may still be fetching the checkpoint


def join(node: Node, *, on_gpu: bool, sharded: bool) -> None:
    """Make the process group that accelerate then finds; does nothing in a process that trains alone."""
    if node.world_size == 1 or torch.distributed.is_initialized():
        return
    file = os.environ.get(MEETING_FILE)
    if file is not None:
        for library in ("NCCL", "GLOO"):
            os.environ[f"{library}_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo" if not on_gpu else "cuda:nccl,cpu:gloo" if sharded or file is not None else "nccl",
        store=FileStore(file, node.world_size) if file is not None else _over_tcp(node),
        rank=node.rank,
        world_size=node.world_size,
        timeout=timedelta(seconds=_SILENT_SECONDS),
    )


def _over_tcp(node: Node) -> Store:
    """The store of the first rank. It listens on the one address that it was announced with."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=_MEET_SECONDS)
    if node.rank != 0:
        store = TCPStore(address, port, node.world_size, is_master=False, timeout=timeout)
    else:
        listener = _listen(address, port)
        store = TCPStore(
            address, port, node.world_size, is_master=True, timeout=timeout, wait_for_workers=False,
            master_listen_fd=listener.detach(), use_libuv=True,
        )  # fmt: skip
    return PrefixStore(os.environ["JOB_RDZV_ID"], store)  # what is left of another attempt meets nobody


def _listen(address: str, port: int) -> socket.socket:
    """A listener on the announced address if that is one of this machine's, else on the interface that serves.

    A name may stand for an address outside (a load balancer): then the address with the default route is taken.
    """
    candidates = [address, own_address(), ""]
    for candidate in candidates:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((candidate, port))
        except OSError:
            listener.close()
            if candidate == candidates[-1]:
                raise
            continue
        listener.listen(512)
        return listener
    raise AssertionError("unreachable")


def gather_bytes(own: bytes, world_size: int, device: torch.device) -> list[bytes]:
    """What every rank has to say, in the order of the ranks, on each of them. No pickle: bytes as they are."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    torch.distributed.all_gather(sizes, torch.tensor([len(own)], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device) if own else padded[:0]
    parts = [torch.zeros_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(parts, padded)
    return [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(parts, sizes, strict=True)]


def from_first(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The first rank's tensor, on every rank; all have the same shape and type."""
    sent = values.to(device, copy=True)
    torch.distributed.broadcast(sent, src=0)
    return sent.cpu()


def meeting_device(device: torch.device) -> torch.device:
    """Where ranks exchange what each of them reads at once: on the CPU if they can, since a GPU first does all its work.

    On several nodes that do not shard a model they can not: which of a node's addresses others reach, only NCCL was told.
    """
    return torch.device("cpu") if "cpu:" in torch.distributed.get_backend_config() else device


def is_so_everywhere(own: bool, device: torch.device) -> bool:
    """Whether it is true in every process that trains. All of them must ask."""
    if not torch.distributed.is_initialized():
        return own
    everyone = torch.tensor(int(own), device=device)
    torch.distributed.all_reduce(everyone, torch.distributed.ReduceOp.MIN)
    return bool(everyone)


def environment_of(
    local_rank: int, processes: Sequence[int], index: int, endpoint: str | None, meeting_file: Path
) -> dict[str, str]:
    """What one rank is told: its place among `processes` per node, and where the ranks meet."""
    told = {
        "RANK": str(sum(processes[:index]) + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(sum(processes)),
        "LOCAL_WORLD_SIZE": str(processes[index]),
        "GROUP_RANK": str(index),
    }
    if endpoint is None:
        return told | {MEETING_FILE: str(meeting_file)}
    address, _, port = endpoint.rpartition(":")
    return told | {"MASTER_ADDR": address, "MASTER_PORT": port}
