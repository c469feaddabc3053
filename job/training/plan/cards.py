"""The GPUs that people rent, with figures from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GIB = 2**30
_CONTEXT = 0.5 * GIB


@dataclass(frozen=True)
class Card:
    """One GPU: bytes of memory, dense 16-bit tensor FLOP/s, memory bandwidth in bytes/s.

    `sustained` is the fraction of the FLOP/s that large products reach for minutes, when power is the limit.
    `own_attention` says whether the job's own attention kernels serve the card (`model/fused/attention.py`), and `too_old`
    that the image's CUDA does not run on it.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    bandwidth: float
    sustained: float = 0.75
    bfloat16: bool = True
    fp8: bool = False
    own_attention: bool = False
    too_old: bool = False

    @property
    def free_bytes(self) -> float:
        """What CUDA's context leaves to a process that has the card for itself."""
        return self.memory_bytes - _CONTEXT

    @property
    def matmul_flops(self) -> float:
        return self.sustained * self.peak_flops


def _card(name: str, gib: float, teraflops: float, gigabytes_per_second: float, **more: float | bool) -> Card:
    return Card(name, int(gib * GIB), teraflops * 1e12, gigabytes_per_second * 1e9, **more)  # type: ignore[arg-type]


# Memory is as the driver reports it. A name that consists of some of another name's words comes after that one.
CARDS = (
    _card("GB200", 184, 2500, 8000, fp8=True),
    _card("B300", 267, 2250, 8000, fp8=True),
    _card("B200", 178, 2250, 8000, fp8=True),
    _card("GH200", 94, 989, 4000, fp8=True, own_attention=True, sustained=0.7),
    _card("H200", 139, 989, 4800, fp8=True, own_attention=True, sustained=0.7),
    _card("H100 PCIe", 79, 756, 2000, fp8=True, own_attention=True, sustained=0.6),
    _card("H100 NVL", 93, 835, 3900, fp8=True, own_attention=True, sustained=0.6),
    _card("H100", 79, 989, 3350, fp8=True, own_attention=True, sustained=0.7),
    _card("H20", 95, 148, 4000, fp8=True, own_attention=True, sustained=0.9),
    _card("A100-40GB", 39.4, 312, 1555, sustained=0.8),
    _card("A100", 79, 312, 2039, sustained=0.8),
    _card("RTX PRO 6000", 95, 504, 1792, fp8=True),
    _card("6000 Ada", 48, 364, 960, fp8=True, sustained=0.6),
    _card("L40S", 44.4, 362, 864, fp8=True, sustained=0.6),
    _card("L40", 44.4, 181, 864, fp8=True),
    _card("L4", 22.2, 121, 300, fp8=True, sustained=0.5),
    _card("A40", 44.9, 150, 696),
    _card("A30", 23.9, 165, 933),
    _card("A10G", 22, 70, 600),
    _card("A10", 22, 125, 600, sustained=0.6),
    _card("A6000", 47.4, 155, 768),
    _card("A5000", 23.9, 111, 768),
    _card("RTX 5090", 31.8, 210, 1792, fp8=True, sustained=0.9),
    _card("RTX 4090", 23.5, 165, 1008, fp8=True, sustained=0.9),
    _card("RTX 3090", 23.6, 71, 936, sustained=0.9),
    _card("GB10", 119, 125, 273, fp8=True),
    _card("T4", 14.6, 65, 320, bfloat16=False, sustained=0.4),
    _card("V100", 15.8, 125, 900, bfloat16=False, too_old=True),
    _card("P100", 15.9, 19, 732, bfloat16=False, too_old=True),
)

_SLICE = re.compile(r"\bmig[\s_-]+([1-7])g\.([1-9]\d*)gb", re.IGNORECASE)
_SLICES = 7  # of a card's multiprocessors; 1g has one of them
_GIGABYTE = 0.975 * GIB  # what the driver reports of each in the name


def card_named(name: str) -> Card | None:
    """The card that a driver or a user calls `name`: the exact name, or else the first card whose words are all in it.

    A MIG slice, such as `H100 MIG 3g.40gb`, has its share of the card's figures. None for unlisted cards.
    """
    part = _SLICE.search(name)
    if part is not None:
        whole = card_named(name[: part.start()])
        return None if whole is None else _slice_of(whole, int(part[1]), int(part[2]))
    if "mig" in _words(name):
        return None
    exact = next((card for card in CARDS if _joined(card.name) in (_joined(name), "rtx" + _joined(name))), None)
    return exact or next((card for card in CARDS if _words(card.name) <= _words(name)), None)


def _slice_of(card: Card, slices: int, gigabytes: int) -> Card:
    memory = int(gigabytes * _GIGABYTE)
    return replace(
        card, name=f"{card.name} MIG {slices}g.{gigabytes}gb", memory_bytes=memory,
        peak_flops=card.peak_flops * slices / _SLICES, bandwidth=card.bandwidth * min(1.0, memory / card.memory_bytes),
    )  # fmt: skip


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[\s_-]+", name.lower().strip()))


def _joined(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())
