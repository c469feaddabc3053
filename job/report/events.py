"""What a stage reports to the supervisor, each event one message on a socket of its own.

What a library prints goes to standard output, which the supervisor only logs. So no text of a model or a dataset can
pass for an event.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from typing import Any

EVENTS_FD = "JOB_EVENTS_FD"  # set in a stage's environment: the socket's file descriptor
LARGEST_EVENT = 1 << 16  # bytes; within what a socket takes in one piece
_LONGEST_TEXT = 12_000  # characters of one text in an event, so that the whole fits


def emit(event: str, **fields: Any) -> None:
    """Report `event` to the supervisor. Only the first rank calls this, so the others stay silent.

    Without a supervisor (a stage started by hand, a test) the event is printed.
    """
    line = json.dumps({"event": event, **_cut(fields)}, ensure_ascii=False, default=str)
    place = os.environ.get(EVENTS_FD)
    if place is None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        return
    with socket.socket(fileno=os.dup(int(place))) as channel, contextlib.suppress(ConnectionError):
        channel.send(line.encode("utf-8", "replace"))  # the supervisor may be gone: then so is this process, soon


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST_TEXT]}…"
    return {name: _cut(item) for name, item in value.items()} if isinstance(value, dict) else value


def message(text: str, level: str = "info") -> None:
    """Report a sentence for people. `level` is debug, info, warning or error."""
    emit("message", level=level, text=text)


def progress(done: float, total: float, unit: str, **figures: Any) -> None:
    """Report how far the stage is. `figures`, such as loss and rate, are shown next to the bar."""
    emit("progress", done=done, total=total, unit=unit, **figures)


def output(what: str, where: str, **figures: float) -> None:
    """Report something that the stage made and people may want to open. It is listed in the closing table."""
    emit("output", what=what, where=where, figures=figures)


def decided(**facts: str) -> None:
    """Report what holds for the rest of the run, on whatever machine it goes on. The first report of a fact counts."""
    emit("decided", facts=facts)


def parse(data: bytes) -> dict[str, Any] | None:
    """The event in one message of the socket, or None if it is not one."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
