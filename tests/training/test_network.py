"""What a run of several nodes says of its network before it trains."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from job.cluster import Node
from job.training import network
from job.training.network import Link, chosen_network, expected_rate, links_of, tell_network

NODE = Node(count=2, world_size=4)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """/sys/class of a node with a network card, a bridge and two InfiniBand ports, one of them down."""
    system = tmp_path / "class"
    for name, state, speed, real in (
        ("eth0", "up", "25000", True),
        ("eth1", "down", "", True),
        ("br0", "up", "10000", False),
    ):
        write(system / "net" / name / "operstate", f"{state}\n")
        write(system / "net" / name / "speed", f"{speed}\n")
        if real:
            (system / "net" / name / "device").mkdir()
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        write(system / "infiniband" / name / "ports" / "1" / "state", f"{state}\n")
        write(system / "infiniband" / name / "ports" / "1" / "rate", "400 Gb/sec (4X NDR)\n")
    return system


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_links_that_are_up_are_known_by_their_speed(machine: Path) -> None:
    links = links_of(machine)
    assert links == [Link("mlx5_0 (RDMA)", 50e9), Link("eth0", 3.125e9)]
    assert expected_rate(links) == 50e9
    assert expected_rate(links[1:]) == 3.125e9
    assert expected_rate([]) is None


def test_nccls_own_words_tell_the_network(tmp_path: Path) -> None:
    assert chosen_network(tmp_path) is None
    write(
        tmp_path / "nccl-node-7.log",
        "node:7:9 [0] NCCL INFO NET/Socket : Using [0]eth0\nnode:7:9 [0] NCCL INFO Using network Socket\n",
    )
    assert chosen_network(tmp_path) == "Socket"


@pytest.mark.parametrize(
    ("rate", "chosen", "level", "words"),
    [
        (
            40e9,
            "IB",
            "info",
            "2 nodes exchange gradients at 40.00 GB/s through NCCL's IB network. This node's links: mlx5_0 (RDMA) 50 GB/s",
        ),
        (2e9, "Socket", "warning", "There are RDMA devices, and NCCL does not use them"),
        (2e9, "IB", "warning", "less than half of what this node's links give"),
        (2e9, None, "warning", "2 nodes exchange gradients at 2.00 GB/s, less than half"),
    ],
)
def test_a_slow_network_is_a_warning_that_says_what_to_look_at(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    rate: float, chosen: str | None, level: str, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(network, "_rate", lambda *_: rate)
    if chosen:
        write(tmp_path / "nccl-node-7.log", f"NCCL INFO Using network {chosen}\n")
    tell_network(NODE, torch.device("cuda"), tmp_path, machine)
    event = said(capsys)
    assert event["level"] == level
    assert words in event["text"]


def test_memory_that_may_not_be_pinned_is_told_unless_root_has_the_right(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pod, a user other than root never has IPC_LOCK, whatever the manifest adds."""
    monkeypatch.setattr(network, "_rate", lambda *_: 2e9)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**23, 2**23))
    status = tmp_path / "status"
    monkeypatch.setattr(network.pinnable_bytes, "__defaults__", (status,))
    write(tmp_path / "nccl-node-7.log", "NCCL INFO Using network Socket\n")
    for capabilities, told in (("0000000000000000", True), ("0000000000004000", False)):
        write(status, f"Name: python\nCapEff:\t{capabilities}\n")
        tell_network(NODE, torch.device("cuda"), tmp_path, machine)
        assert ("may pin only 8 MiB of memory" in said(capsys)["text"]) is told
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    write(status, "CapEff:\t0000000000000000\n")
    assert network.pinnable_bytes(status) is None


def test_without_known_links_only_the_rate_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "_rate", lambda *_: 2e9)
    tell_network(NODE, torch.device("cuda"), tmp_path, tmp_path)
    assert said(capsys)["text"] == "2 nodes exchange gradients at 2.00 GB/s."


def test_the_rate_is_what_passes_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce of b bytes in t seconds between 4 ranks moves 1.5 b past each of them (nccl-tests, PERFORMANCE.md)."""
    monkeypatch.setattr(network, "_seconds", lambda values, count: 0.01 * count)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    assert network._rate(4, torch.device("cpu")) == pytest.approx(1.5 * 2**22 / 0.01)
