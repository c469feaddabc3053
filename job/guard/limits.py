"""Limits on work that a stranger's file may ask for: time, nesting, the disk."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from job.errors import InputError

# What rendering and tokenizing takes at most for any real template and tokenizer, on a slow machine
_ROW_SECONDS, _CHARACTERS_PER_SECOND = 0.05, 50_000
_DEEPEST = 200  # levels of a JSON document


class TooMuch(ValueError):
    """A file asks for more work than any real one does."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TooMuch in the main thread if the block takes longer.

    Code that does not return to Python cannot be interrupted, only killed: after three times as much CPU time the kernel
    ends the process with SIGVTALRM, and the supervisor says why.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooMuch(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Time for a stranger's program that is run for every row: as long as rows of such sizes may take, and half a minute more.

    A limit on one row alone would let a program that stays just below it take days for all of them.
    """

    def __init__(self, *, slack_seconds: float = 30.0) -> None:
        self._left = slack_seconds

    @contextlib.contextmanager
    def row(self, characters: int, rows: int = 1) -> Iterator[None]:
        """Count the time of the block, which is about some rows. Raises InputError once the budget is used up."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._left += rows * _ROW_SECONDS + characters / _CHARACTERS_PER_SECOND - (time.monotonic() - began)
            if self._left < 0:
                raise InputError(
                    "The model's chat template, or its tokenizer, takes longer for the rows than any real one does.",
                    "Set FT_CHAT_TEMPLATE to another template, or use another model if you do not trust its author.",
                )


def limit_files(largest_bytes: int) -> None:
    """Let no file that this process writes become larger: a small dataset may unpack to more than the disk holds.

    A tenth is left for other files, so that this limit, whose error says why, is met before the disk is full.
    """
    largest_bytes = largest_bytes * 9 // 10
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = largest_bytes if hard == resource.RLIM_INFINITY else min(largest_bytes, hard)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with EFBIG instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))


def bounded_json(data: bytes, largest_bytes: int) -> Any:
    """A JSON document of limited size and depth. Raises TooMuch or ValueError."""
    if len(data) > largest_bytes:
        raise TooMuch(f"it has {len(data):,} bytes, and {largest_bytes:,} are the most")
    try:
        value = json.loads(data)
    except RecursionError:
        raise TooMuch("it is nested too deeply") from None
    if _depth(value) > _DEEPEST:
        raise TooMuch(f"it is nested deeper than {_DEEPEST} levels")
    return value


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        if depth > _DEEPEST:
            break
        if isinstance(item, dict):
            waiting.extend((part, depth + 1) for part in item.values() if isinstance(part, dict | list))
        elif isinstance(item, list):
            waiting.extend((part, depth + 1) for part in item if isinstance(part, dict | list))
    return deepest
