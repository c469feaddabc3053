"""Which rows of which datasets are trained on, and which are held out to evaluate on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from job.data.conversations import Reading
from job.data.files import Batch, FileOptions
from job.data.formats import Format
from job.data.selection import Selection
from job.data.trees import gathered
from job.settings import Settings

Mask = np.ndarray[Any, Any]  # for each row, whether it is used


@dataclass
class Source:
    """The rows of one dataset: where they are, how they are read, and which of them are used."""

    selection: Selection
    options: FileOptions
    format: Format
    reading: Reading
    weight: float
    mask: Mask | None = None

    def batches(self) -> Iterator[Batch]:
        """The rows, as often as the weight says, without those that the mask excludes."""
        masks: list[Mask | None] = [None] * int(self.weight)
        if (some := self._some()) is not None:
            masks.append(some)
        streams = (self.selection.batches(self.options) for _ in masks)
        rounds = (
            _masked(gathered(batches) if self.format.trees else batches, mask)
            for batches, mask in zip(streams, masks, strict=True)
        )
        return _masked(itertools.chain.from_iterable(rounds), self.mask)

    def _some(self) -> Mask | None:
        """Which rows are used once more, since the weight is no whole number."""
        rest = self.weight - int(self.weight)
        if rest <= 1e-9:
            return None
        count = self.selection.count(replace(self.options, tell=lambda text: None))
        some = np.zeros(count, bool)
        some[np.random.default_rng(0).permutation(count)[: round(rest * count)]] = True
        return some

    def places(self, count: int) -> np.ndarray[Any, Any]:
        """For each of the `count` rows that the weight makes of them, its place among the dataset's own rows."""
        if self.weight == 1:
            return np.arange(count)
        once = count_rows(replace(self, weight=1.0, mask=None))
        parts, some = [np.arange(once)] * int(self.weight), self._some()
        return np.concatenate(parts if some is None else [*parts, np.flatnonzero(some[:once])])


def _masked(batches: Iterator[Batch], mask: Mask | None) -> Iterator[Batch]:
    position = 0
    for batch in batches:
        if mask is None:
            yield batch
            continue
        chosen = np.flatnonzero(mask[position : position + len(batch)]).tolist()
        position += len(batch)
        if chosen:
            yield batch.only(chosen)


def count_rows(source: Source) -> int:
    """The rows that a source gives. Reads all of them."""
    return sum(map(len, replace(source, options=replace(source.options, tell=lambda text: None)).batches()))


def sampled(count: int, settings: Settings) -> Mask | None:
    """Which of all rows are used: all, or FT_DATASET_SAMPLE of them."""
    if not count:
        return None
    used = np.ones(count, bool)
    if settings.dataset_sample is not None and settings.dataset_sample < count:
        used[np.random.default_rng(settings.seed).permutation(count)[settings.dataset_sample :]] = False
    return used


def places_of(sources: Sequence[Source], counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """For each of all rows a number that only its copies share, which a weight above 1 makes."""
    starts = itertools.accumulate(counts, initial=0)
    return np.concatenate(
        [source.places(count) + start for source, count, start in zip(sources, counts, starts, strict=False)]
    )


def held_out(used: Mask, places: np.ndarray[Any, Any], fraction: float, seed: int) -> tuple[Mask, Mask]:
    """The rows to evaluate on, those that `datasets.Dataset.train_test_split` would choose, and these with their copies."""
    rows = np.flatnonzero(used)
    rows = rows[np.sort(np.unique(places[rows], return_index=True)[1])]
    held = rows[np.random.default_rng(seed).permutation(len(rows))[: math.ceil(fraction * len(rows))]]
    chosen = np.zeros(len(used), bool)
    chosen[held] = True
    return chosen, np.isin(places, places[held])


def assign(sources: Sequence[Source], counts: Sequence[int], mask: Mask) -> None:
    """Let the sources give only the rows of `mask`, which is over all of them one after another."""
    position = 0
    for source, count in zip(sources, counts, strict=True):
        source.mask = mask[position : position + count]
        position += count
