"""A record of which rows were trained on in which order, so that a resumed run can repeat it and prove that it did."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from job.errors import InputError
from job.training.ranks import from_first


class DataOrder:
    """The order of the current epoch's rows, and a digest of all rows trained on since the run started.

    A sampler draws its order when an epoch's first row is requested, and some samplers use torch's global generator.
    The generator's state at that moment goes into the checkpoint and is restored at the same moment of the resumed
    epoch. Without it, a resumed epoch grouped by length would visit some rows twice and others never. The digest shows
    whether the rows that the resumed loader skips are those that the checkpoint was trained on.
    """

    def __init__(self) -> None:
        self._finished = hashlib.sha256().hexdigest()  # digest of the epochs before this one
        self._drawn = array("q")
        self._sampler: Any = None
        self._generator: torch.Tensor | None = None
        self._batches = 0
        self._batches_per_epoch = self._rows_per_batch = 0
        self._expected: str | None = None
        self._to_restore: torch.Tensor | None = None

    def watch(self, loader: DataLoader[Any], rows_per_batch: int) -> None:
        """Record the rows that `loader` draws. `rows_per_batch` counts the rows of all processes."""
        self._batches_per_epoch, self._rows_per_batch = len(loader), rows_per_batch
        sampler: Any = loader.batch_sampler
        while hasattr(sampler, "batch_sampler"):  # accelerate's wrapper, which draws one process's share
            sampler = sampler.batch_sampler
        sampler.sampler = self._sampler = _Recorded(sampler.sampler, self)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch it draws for. After a resume, accelerate's wrappers do not pass it on."""
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def epoch_began(self) -> None:
        """Call this when the sampler is about to draw an epoch's order."""
        if self._to_restore is not None:
            torch.set_rng_state(self._to_restore)
            self._to_restore = None
        else:
            _share_generator()
            self._finished, self._batches = self.digest(), 0
        self._generator, self._drawn = torch.get_rng_state(), array("q")

    def row_drawn(self, row: int) -> None:
        self._drawn.append(row)

    def batch_trained(self) -> None:
        """Call this before a batch is trained on. Raises InputError if the order differs from the checkpoint's."""
        self._refuse_another_order()
        self._batches += 1

    def _refuse_another_order(self) -> None:
        expected, self._expected = self._expected, None
        if expected is not None and self._digest_of_drawn() != expected:
            raise InputError(
                "The rows are not in the order in which the checkpoint was trained on them.",
                "Continue with the versions of torch, transformers and accelerate that started the run, or choose another FT_RUN_ID.",
            )

    def digest(self) -> str:
        """SHA-256 of the indices of all rows trained on so far, in order, epoch by epoch."""
        return self._expected or self._digest_of_drawn()

    def _digest_of_drawn(self) -> str:
        trained = self._drawn[: self._batches * self._rows_per_batch]
        if not trained:
            return self._finished
        return hashlib.sha256(self._finished.encode() + trained.tobytes()).hexdigest()

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint."""
        within = 0 < self._batches < self._batches_per_epoch
        return {
            "digest": self.digest(),
            "finished": self._finished if within else self.digest(),
            "batches": self._batches if within else 0,
            "generator": self._generator if within else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self._finished, self._batches, self._to_restore = state["finished"], state["batches"], state["generator"]
        self._expected = state["digest"] if self._batches else None
        self._drawn = array("q")


def _share_generator() -> None:
    """Give every process the generator of the first one, since each draws the order itself and all orders must agree.

    They would differ on the CPU: dropout uses the same generator there, and draws more or fewer numbers by row length.
    """
    if torch.distributed.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if _by_nccl() else torch.device("cpu")
        torch.set_rng_state(from_first(torch.get_rng_state(), device))


def _by_nccl() -> bool:
    return "nccl" in str(torch.distributed.get_backend())


class _Recorded(Sampler[int]):
    """Wraps a sampler and reports every row that it draws to `order`."""

    def __init__(self, sampler: Any, order: DataOrder) -> None:
        self._sampler, self._order = sampler, order

    def __iter__(self) -> Iterator[int]:
        self._order.epoch_began()
        for row in self._sampler:
            self._order.row_drawn(int(row))
            yield row

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def row_lengths(rows: Dataset) -> list[int]:
    """The number of tokens of each row, from Arrow's list offsets. Reading the rows would take a millisecond each."""
    lengths: list[int] = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_pylist()
    return lengths
