"""The GPUs that people rent, with figures from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU: bytes of memory, dense 16-bit tensor FLOP/s, memory bandwidth in bytes/s.

    `sustained` is the fraction of the FLOP/s that large products reach for minutes, when power is the limit.
    `own_attention` says whether the job's own attention kernels serve the card (`model/fused/attention.py`).
    """

    name: str
    memory_bytes: int
    peak_flops: float
    bandwidth: float
    sustained: float = 0.75
    bfloat16: bool = True
    fp8: bool = False
    own_attention: bool = False

    @property
    def matmul_flops(self) -> float:
        return self.sustained * self.peak_flops


def _card(name: str, gib: float, teraflops: float, gigabytes_per_second: float, **more: float | bool) -> Card:
    return Card(name, int(gib * GIB), teraflops * 1e12, gigabytes_per_second * 1e9, **more)  # type: ignore[arg-type]


# Memory is as the driver reports it. A name that consists of some of another name's words comes after that one.
CARDS = (
    _card("B200", 178, 2250, 8000, fp8=True),
    _card("GH200", 94, 989, 4000, fp8=True, own_attention=True, sustained=0.7),
    _card("H200", 139, 989, 4800, fp8=True, own_attention=True, sustained=0.7),
    _card("H100 PCIe", 79, 756, 2000, fp8=True, own_attention=True, sustained=0.6),
    _card("H100 NVL", 93, 835, 3900, fp8=True, own_attention=True, sustained=0.6),
    _card("H100", 79, 989, 3350, fp8=True, own_attention=True, sustained=0.7),
    _card("A100-40GB", 39.4, 312, 1555, sustained=0.8),
    _card("A100", 79, 312, 2039, sustained=0.8),
    _card("L40S", 44.4, 362, 864, fp8=True, sustained=0.6),
    _card("L40", 44.4, 181, 864, fp8=True),
    _card("L4", 22.2, 121, 300, fp8=True, sustained=0.5),
    _card("A10G", 22, 70, 600),
    _card("A10", 22, 125, 600, sustained=0.6),
    _card("A6000", 47.4, 155, 768),
    _card("RTX 4090", 23.5, 165, 1008, fp8=True, sustained=0.9),
    _card("RTX 3090", 23.6, 71, 936, sustained=0.9),
    _card("V100", 15.8, 125, 900, bfloat16=False),
    _card("T4", 14.6, 65, 320, bfloat16=False, sustained=0.4),
)


def card_named(name: str) -> Card | None:
    """The card that a driver or a user calls `name`: the exact name, or else the first card whose words are all in it.

    None for unlisted cards and for MIG slices.
    """
    if "mig" in _words(name):
        return None  # a slice of a card has other figures
    exact = next((card for card in CARDS if _joined(card.name) in (_joined(name), "rtx" + _joined(name))), None)
    return exact or next((card for card in CARDS if _words(card.name) <= _words(name)), None)


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[\s_-]+", name.lower().strip()))


def _joined(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
