"""The table of `entrypoint.py plan` over several GPUs: which of them fit, how fast they are, and what the training costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from job.errors import SettingsError
from job.settings import Settings
from job.training.plan.candidates import Plan, plans
from job.training.plan.cards import CARDS, GIB, Card, card_named
from job.training.plan.choose import choose, fits
from job.training.plan.load import Load, Shape

PREDICTED = "Predicted from measurements on an H200 and the cards' data sheets."

Cards = list[tuple[int, Card]]  # how many, of which

_SEVERAL_FACTOR = 0.95  # the speed of each of several cards that train together, relative to one alone
_UNKNOWN_TOKENS = 1e8  # for hours and prices before the data is prepared
_MOST_CARDS = 100_000
_COUNTED = re.compile(r"(\d{1,9})\s*[x×]\s*(.+)", re.IGNORECASE)


def wanted_cards(settings: Settings, *, any_here: bool) -> Cards | None:
    """The cards of FT_PLAN_GPU, or all if it is unset and this machine has none. None for this machine's own.

    Raises SettingsError for a card that the planner does not know, also among those of FT_GPU_PRICE.
    """
    for name in settings.gpu_price:
        if name:
            _known("FT_GPU_PRICE", name)
    if settings.plan_gpu is None and any_here:
        return None
    if settings.plan_gpu is None or settings.plan_gpu.strip().lower() == "all":
        return [(1, card) for card in CARDS]
    found = []
    for part in filter(None, map(str.strip, settings.plan_gpu.split(","))):
        counted = _COUNTED.fullmatch(part)
        count, name = (int(counted[1]), counted[2]) if counted else (1, part)
        if not 1 <= count <= _MOST_CARDS:
            raise SettingsError(
                f"FT_PLAN_GPU={settings.plan_gpu!r} asks for {f'{count:,} cards' if count else 'no card'}.",
                f"Write 8xH100, for example. 1 to {_MOST_CARDS:,} are possible.",
            )
        found.append((count, _known("FT_PLAN_GPU", name)))
    if not found:
        raise SettingsError(f"FT_PLAN_GPU={settings.plan_gpu!r} names no card.", f"Name some of {_names()}, or all.")
    return found


def _known(setting: str, name: str) -> Card:
    card = card_named(name)
    if card is None:
        raise SettingsError(f"{setting}={name!r} is not a card that the planner knows.", f"It knows {_names()}.")
    return card


def _names() -> str:
    return ", ".join(card.name for card in CARDS)


def lacks(card: Card, settings: Settings) -> str | None:
    """What the card lacks for the fused layers, or None."""
    if card.too_old:
        return f"the image's CUDA 13 needs compute capability 7.5 or newer, which the {card.name} lacks"
    if not card.bfloat16:
        return "their attention needs an Ampere GPU or newer"
    if settings.frozen_precision == "fp8" and not card.fp8:
        return "this card has no 8-bit floats (FT_FROZEN_PRECISION)"
    return None


@dataclass(frozen=True)
class _Row:
    """A line of the table. `rate` is tokens/s of all cards together, or None where training is not possible or planned."""

    name: str
    card: Card
    rate: float | None
    hours: float | None
    cost: float | None
    plan: Plan | None
    why_not: str = ""

    @property
    def order(self) -> tuple[float, ...]:
        """Cheapest first, then those without a price, fastest first; those that do not fit come last."""
        return (self.rate is None, self.cost is None, self.cost or 0.0, -(self.rate or 0.0), -self.card.memory_bytes)


def compare(cards: Cards, shape: Shape, load: Load, settings: Settings, tokens: float | None) -> list[str]:
    """The lines of the table.

    `tokens` are those of the whole training, or with FT_MAX_STEPS those of each card. None before the data is prepared.
    """
    limit = math.inf if settings.gpu_memory_gib is None else settings.gpu_memory_gib * GIB
    rows = sorted(
        (_row(count, card, shape, load, settings, tokens or _UNKNOWN_TOKENS, limit) for count, card in cards),
        key=lambda row: row.order,
    )
    priced = any(row.cost is not None for row in rows)
    lines = [f"\n{'GPU':<20}{'memory':>10}{'needed':>11}{'tokens/s':>12}{'hours':>9}{'price':>11}" if priced
             else f"\n{'GPU':<20}{'memory':>10}{'needed':>11}{'tokens/s':>12}{'hours':>9}"]  # fmt: skip
    lines += [_line(row, priced) for row in rows]
    if not any(row.rate for row in rows):
        lines.append("None of them fits: choose larger cards, or lower FT_MAX_SEQ_LENGTH.")
    lines.append(
        "Hours are for the prepared data, without start and evaluation."
        if tokens is not None
        else "Hours are for 100 million tokens in the largest batches: the data is not prepared yet, and shorter rows are slower."
    )
    if not priced:
        lines.append(
            "Set FT_GPU_PRICE to what a GPU costs per hour (2.9, or A100=1.5,H100=2.9) to see prices, cheapest first."
        )
    return [*lines, PREDICTED]


def _row(count: int, card: Card, shape: Shape, load: Load, settings: Settings, tokens: float, limit: float) -> _Row:
    name = card.name if count == 1 else f"{count} × {card.name}"
    if (reason := lacks(card, settings)) is not None:
        by_plain_layers = not card.bfloat16 and not card.too_old
        return _Row(
            name, card, None, None, None, None, "plain layers only: not predicted" if by_plain_layers else reason
        )
    free = min(card.free_bytes, limit)
    plan = choose(list(plans(shape, load, card, settings)), free)
    if not fits(plan, free):
        return _Row(name, card, None, None, None, plan, "does not fit")
    rate = count * load.mean_batch / plan.seconds * (_SEVERAL_FACTOR if count > 1 else 1.0)
    hours = tokens / rate / 3600 * (count if settings.max_steps is not None else 1)
    price = _price_of(card, settings)
    return _Row(name, card, rate, hours, None if price is None else price * hours * count, plan)


def _price_of(card: Card, settings: Settings) -> float | None:
    prices = settings.gpu_price
    named = {found.name: price for name, price in prices.items() if name and (found := card_named(name)) is not None}
    return named.get(card.name, prices.get(""))


def _line(row: _Row, priced: bool) -> str:
    line = f"{row.name:<20}{row.card.memory_bytes / GIB:>6.0f} GiB"
    line += " " * 11 if row.plan is None else f"{row.plan.memory_bytes / GIB:>7.1f} GiB"
    if row.rate is None or row.hours is None:
        return f"{line}  {row.why_not}"
    line += f"{float(f'{row.rate:.3g}'):>12,.0f}{_rounded(row.hours):>9}"
    return line + (f"{'?' if row.cost is None else _rounded(row.cost):>11}" if priced else "")


def _rounded(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
