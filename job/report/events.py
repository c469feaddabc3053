"""What a stage tells the supervisor: one JSON object a line on standard output, behind a record separator (RFC 7464).

Whatever else appears on a stage's output comes from a library and goes to the stage's log file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

RECORD_SEPARATOR = "\x1e"


def emit(event: str, **fields: Any) -> None:
    """Tell the supervisor of `event`; ranks other than the first keep silent by not calling this."""
    line = json.dumps({"event": event, **fields}, ensure_ascii=False, default=str)
    sys.stdout.write(f"{RECORD_SEPARATOR}{line}\n")
    sys.stdout.flush()


def message(text: str, level: str = "info") -> None:
    """A sentence for a person: `level` is debug, info, warning or error."""
    emit("message", level=level, text=text)


def progress(done: float, total: float, unit: str, **figures: Any) -> None:
    """How far the stage is; `figures` such as loss and rate stand beside the bar."""
    emit("progress", done=done, total=total, unit=unit, **figures)


def output(what: str, where: str) -> None:
    """Something that the stage made and a person may want to open; it goes into the closing table."""
    emit("output", what=what, where=where)


def parse(line: str) -> tuple[str, dict[str, Any] | None]:
    """What a library wrote of `line`, and the event that it carries, if any.

    Both can stand in one line: a library's unfinished line is still open when a stage reports.
    """
    before, separator, rest = line.partition(RECORD_SEPARATOR)
    try:
        event = json.loads(rest) if separator else None
    except ValueError:
        return line, None
    return (before, event) if isinstance(event, dict) and "event" in event else (line, None)
