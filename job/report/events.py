"""Events from a stage to the supervisor: one JSON object per line of stdout, after a record separator (RFC 7464).

Anything else on a stage's output comes from a library and goes to the stage's log file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

RECORD_SEPARATOR = "\x1e"


def emit(event: str, **fields: Any) -> None:
    """Send `event` to the supervisor. Only the first rank calls this."""
    line = json.dumps({"event": event, **fields}, ensure_ascii=False, default=str)
    sys.stdout.write(f"{RECORD_SEPARATOR}{line}\n")
    sys.stdout.flush()


def message(text: str, level: str = "info") -> None:
    """Send a sentence for a person. `level` is debug, info, warning or error."""
    emit("message", level=level, text=text)


def progress(done: float, total: float, unit: str, **figures: Any) -> None:
    """Report how far the stage is. `figures`, such as loss and rate, appear next to the bar."""
    emit("progress", done=done, total=total, unit=unit, **figures)


def output(what: str, where: str, **figures: float) -> None:
    """Report a result that a person may want to open. It appears in the final table."""
    emit("output", what=what, where=where, figures=figures)


def parse(line: str) -> tuple[str, dict[str, Any] | None]:
    """Split `line` into a library's text and the event after it, or None if there is no event.

    One line can hold both, when a stage reports while a library's line is unfinished.
    """
    before, separator, rest = line.partition(RECORD_SEPARATOR)
    try:
        event = json.loads(rest) if separator else None
    except ValueError:
        return line, None
    return (before, event) if isinstance(event, dict) and "event" in event else (line, None)
