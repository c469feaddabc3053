"""Goodput of training in words: how fast it ran, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = {
    "compute": "training", "start": "start", "first_step": "first step", "data": "waiting for data", "save": "saving",
    "evaluation": "evaluation", "idle": "other",
}  # fmt: skip


def speed_text(goodput: Mapping[str, Any]) -> str | None:
    """Tokens per second and the part of the GPU that they use. None if no step was measured."""
    if "tokens_per_second" not in goodput:
        return None
    text = f"{goodput['tokens_per_second']:,.0f} tokens/s per process, {goodput['useful_flops_per_second'] / 1e12:,.3g} useful TFLOP/s"
    part = goodput.get("part_of_matmul_rate")
    return text if part is None else f"{text} ({part:.0%} of what large matrix products reach on this GPU)"


def time_text(goodput: Mapping[str, Any]) -> str:
    """Where the time went, largest part first. Parts under half a second are left out."""
    seconds: dict[str, float] = {name: goodput["seconds"].get(name, 0.0) for name in _NAMES}
    named = sorted(((spent, _NAMES[name]) for name, spent in seconds.items() if spent >= 0.5), reverse=True)
    return ", ".join(f"{name} {spent:,.0f} s" for spent, name in named) or "under a second"


def first_step_text(goodput: Mapping[str, Any]) -> str | None:
    """How long this start of the job took to complete its first step. None if there was no step."""
    after = goodput.get("first_step_after_seconds")
    return None if after is None else f"done {after:,.0f} s after the job started"
