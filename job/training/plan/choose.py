"""The choice among the candidates: the fastest plan that fits, and the next smaller one if memory still runs out."""

from __future__ import annotations

from dataclasses import replace

from job.settings import Settings
from job.training.plan.candidates import Plan, predicted_bytes
from job.training.plan.cards import GIB, Card
from job.training.plan.load import Shape

_RESERVE = 0.5 * GIB  # kernels that are loaded later, and blocks of the allocator that fit no tensor
_FRAGMENTS = 1.03


def choose(candidates: list[Plan], free_bytes: float) -> Plan:
    """The fastest plan that fits into `free_bytes`, or the one that needs the least memory if none fits.

    A plan whose parts are so short that the host only just keeps up is the fastest on few hosts, and by far the slowest on
    others. So what decides is the expectation over hosts. CUDA's context is not in them (`Card.free_bytes`).
    """
    fitting = [plan for plan in candidates if fits(plan, free_bytes)]
    if not fitting:
        return min(candidates, key=lambda plan: (plan.memory_bytes, plan.expected_seconds))
    return min(fitting, key=lambda plan: (plan.expected_seconds, plan.memory_bytes))


def fits(plan: Plan, free_bytes: float) -> bool:
    return plan.memory_bytes * _FRAGMENTS + _RESERVE <= free_bytes


def smaller_plan(plan: Plan, shape: Shape, settings: Settings, card: Card) -> Plan | None:
    """The next plan that needs less memory and can be used immediately. None if there is none."""
    if plan.captured_tokens:
        smaller = replace(plan, captured_tokens=0)
    elif plan.recomputed < shape.layers:
        more = max(1, shape.layers // 4)
        smaller = replace(plan, recomputed=min(shape.layers, plan.recomputed + more))
    elif plan.micro_batch_tokens > plan.longest_row:  # rows are never cut
        tokens = max(plan.longest_row, plan.micro_batch_tokens // 2)
        smaller = replace(plan, micro_batch_tokens=tokens, parts=2 * plan.parts)
    else:
        return None
    return replace(
        smaller, memory_bytes=round(predicted_bytes(shape, smaller, settings, card)), seconds=0.0, expected_seconds=0.0
    )
