"""Encodes the rows of a dataset on all cores, in order, with memory that does not grow with the dataset."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np

from job.data.conversations import Example, Reading
from job.data.files import Batch, Damaged, LeftOut, Malformed, Row
from job.data.formats import Format, NotWanted, renamed
from job.data.masking import Encoder, Encoding
from job.errors import InputError, in_a_line
from job.guard.limits import Budget, TooMuch, time_limit

TooLong = Literal["auto", "cut", "cut_left", "drop", "split"]

_LONGEST_TEXT = 4 << 20  # characters of a row; the tokenizer takes some 200 bytes for each
_ROW_SECONDS = 20.0
_PREVIEW = 200  # characters
_ALONE = 6  # batches that are encoded here before other processes are worth their start


@dataclass(frozen=True)
class Bad:
    """A row that was left out: where it is, why, and how it begins."""

    place: str
    reason: str
    preview: str
    wrong: bool = False  # its file is broken, or it says what would be left out: no mere exception among the rows


@dataclass
class Encoded:
    """The documents of a batch, one after another in `ids` and `learned`, and what became of the other rows."""

    ids: np.ndarray[Any, Any]
    learned: np.ndarray[Any, Any]
    lengths: np.ndarray[Any, Any]
    hashes: np.ndarray[Any, Any]  # 8 bytes of each document's SHA-256
    rows: int = 0
    full_lengths: list[int] = field(default_factory=list)  # before anything was cut
    cut: int = 0
    too_long: int = 0  # dropped for their length
    split: int = 0
    nothing_left: int = 0  # whose learned tokens were all cut off
    not_wanted: int = 0
    conversations: int = 0
    bad: list[Bad] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)


@dataclass
class RowEncoder:
    """What a worker does with a batch of rows: read each in its format, encode it, and hold it to its length."""

    format: Format
    reading: Reading
    encoder: Encoder
    max_length: int
    too_long: TooLong = "cut"
    budget: Budget = field(default_factory=Budget)

    def __call__(self, batch: Batch) -> Encoded:
        self.reading.told.clear()
        bad: list[Bad] = []
        not_wanted, examples, places = 0, [], []
        for number, row in batch.rows():
            try:
                examples.append(self._read(row))
                places.append((number, row))
            except NotWanted:
                not_wanted += 1
            except Malformed as reason:
                bad.append(_bad(batch, number, row, reason))
        documents: list[Encoding] = []
        for (number, row), found in zip(places, self._encode(examples), strict=True):
            if isinstance(found, Malformed):
                bad.append(_bad(batch, number, row, found))
            else:
                documents.append(found)
        encoded = self._of_length(documents)
        encoded.rows, encoded.bad, encoded.not_wanted = len(batch), bad, not_wanted
        encoded.conversations = sum(example.messages is not None for example in examples)
        encoded.told = dict(self.reading.told)
        return encoded

    def _read(self, row: Row | Malformed) -> Example:
        if isinstance(row, Malformed):
            raise row
        try:
            example = self.format.read(renamed(row, self.reading.columns), self.reading)
        except (Malformed, NotWanted):
            raise
        except Exception as error:  # a stranger's row may hold anything anywhere
            raise Malformed(f"it does not fit {self.format.name}: {in_a_line(error)}") from error
        if example.messages is None and self.reading.system_prompt is not None:
            self.reading.tell("FT_SYSTEM_PROMPT is not put before rows that are no conversations")
        if (size := _characters(example)) > _LONGEST_TEXT:
            raise Malformed(f"it has {size:,} characters, and {_LONGEST_TEXT:,} are the most")
        return example

    def _encode(self, examples: Sequence[Example]) -> Sequence[Encoding | Malformed]:
        """All together; one by one if that fails, so that one row alone is to blame."""
        if len(examples) > 1:
            size = sum(map(_characters, examples))
            with (
                contextlib.suppress(_Failed),
                _failing(),
                time_limit(_ROW_SECONDS, "rendering and tokenizing them"),
                self.budget.row(size, len(examples)),
            ):
                return self.encoder.encode(examples)
        return [self._encode_one(example) for example in examples]

    def _encode_one(self, example: Example) -> Encoding | Malformed:
        try:
            with self.budget.row(_characters(example)), time_limit(_ROW_SECONDS, "rendering and tokenizing it"):
                return self.encoder.encode([example])[0]
        except (KeyboardInterrupt, SystemExit, OSError, InputError):
            raise
        except BaseException as error:
            reason = str(error) if isinstance(error, TooMuch) else in_a_line(error)
            if not _is_text(example):
                reason = "it has half of a surrogate pair, which is no character"
            return Malformed(reason or "it cannot be rendered")

    def _of_length(self, documents: Sequence[Encoding]) -> Encoded:
        limit, kept = self.max_length, []
        counts = {"cut": 0, "too_long": 0, "split": 0, "nothing_left": 0}
        for document in documents:
            pieces = [(document.ids, document.learned)]
            if len(document.ids) > limit:
                pieces = self._shortened(document, counts)
            learnable = [piece for piece in pieces if piece[1][1:].any()]
            counts["nothing_left"] += bool(pieces) and not learnable
            kept += learnable
        ids = [piece[0] for piece in kept]
        return Encoded(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            learned=np.concatenate([piece[1] for piece in kept]) if kept else np.zeros(0, bool),
            lengths=np.fromiter(map(len, ids), np.int32, len(ids)),
            hashes=np.frombuffer(b"".join(hashlib.sha256(piece.tobytes()).digest()[:8] for piece in ids), np.uint64),
            full_lengths=[len(document.ids) for document in documents],
            cut=counts["cut"],
            too_long=counts["too_long"],
            split=counts["split"],
            nothing_left=counts["nothing_left"],
        )

    def _shortened(self, document: Encoding, counts: dict[str, int]) -> list[tuple[Any, Any]]:
        ids, learned, limit = document.ids, document.learned, self.max_length
        if self.too_long == "drop":
            counts["too_long"] += 1
            return []
        if self.too_long == "split":
            counts["split"] += 1
            edges = [*range(0, len(ids), limit), len(ids)]
            if edges[-1] - edges[-2] == 1:  # nothing predicts a token that stands alone
                edges[-2] -= 1
            return [(ids[at:end], learned[at:end]) for at, end in itertools.pairwise(edges)]
        counts["cut"] += 1
        if self.too_long == "cut_left":
            if ids[0] not in self.encoder.openings:
                return [(ids[-limit:], learned[-limit:])]
            rest = len(ids) - limit + 1  # what every text begins with, BOS, is kept
            return [(np.append(ids[:1], ids[rest:]), np.append(learned[:1], learned[rest:]))]
        return [(ids[:limit], learned[:limit])]


class _Failed(Exception):
    """A template is a program, and the tokenizer's Rust panics: anything may have been raised. What it held is let go."""


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError, InputError):
        raise
    except BaseException:
        raise _Failed from None


def encode_all(
    batches: Iterator[Batch], work: RowEncoder, workers: int, check_stop: Callable[[], None] = lambda: None
) -> Iterator[Encoded]:
    """Encode batches in order, with up to `workers` processes. Their number changes nothing but the time it takes.

    Raises BrokenProcessPool if one of the processes is killed.
    """
    for _ in range(_ALONE if workers > 1 else 0):
        check_stop()
        if (first := next(batches, None)) is None:
            return
        yield work(first)
    if workers <= 1:
        for batch in batches:
            check_stop()
            yield work(batch)
        return
    global _work
    _work = work  # what a forked process finds
    waiting: deque[Future[Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin)
    try:
        for batch in batches:
            check_stop()
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            check_stop()
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_work: RowEncoder | None = None


_PR_SET_PDEATHSIG = 1


def _begin() -> None:
    """In a new process: end with the one that started it (prctl(2)), which may be killed, and when that wants it.

    A stage ignores SIGTERM, with which the pool ends the other processes when one was killed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is enough


def _encode(batch: Batch) -> Encoded:
    assert _work is not None
    return _work(batch)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _bad(batch: Batch, number: int, row: Row | Malformed, reason: Malformed) -> Bad:
    text = "" if isinstance(row, Malformed) else json.dumps(row, ensure_ascii=False, default=str)
    if isinstance(row, Malformed) and not isinstance(batch.content, Mapping):
        raw = batch.content[list(batch.numbers).index(number)]
        text = raw[: 4 * _PREVIEW].decode("utf-8", "replace") if isinstance(raw, bytes) else ""
    return Bad(batch.place(number), str(reason), text[:_PREVIEW], isinstance(reason, Damaged | LeftOut))


def _is_text(example: Example) -> bool:
    turns = example.messages or [{"prompt": example.text, "completion": example.completion}]
    try:
        json.dumps(turns, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _characters(example: Example) -> int:
    if example.messages is None:
        return len(example.text or "") + len(example.completion or "")
    return sum(
        len(text) if isinstance(text, str) else len(str(text)) for turn in example.messages for text in turn.values()
    )
