"""The supervisor's voice: a live bar on a terminal, one JSON object per line elsewhere."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from job.run import now
from job.settings import masked, secret_values

_LEVELS = ("debug", "info", "warning", "error")
_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}


@dataclass
class StageRecord:
    """One row of the closing table."""

    stage: str
    result: str
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)


class Console(Protocol):
    def say(self, text: str, level: str = "info", **fields: Any) -> None: ...
    def stage_started(self, stage: str) -> None: ...
    def stage_ended(self, record: StageRecord) -> None: ...
    def progress(self, stage: str, event: dict[str, Any]) -> None: ...
    def summary(self, records: list[StageRecord], closing: str) -> None: ...


def open_console(log_format: str, log_level: str, stream: TextIO = sys.stdout) -> Console:
    """`auto` is text where a person watches, JSON where a log collector does."""
    text = log_format == "text" or (log_format == "auto" and stream.isatty())
    return TextConsole(log_level, stream) if text else JsonConsole(log_level, stream)


class JsonConsole:
    """One JSON object a line, each with time and level."""

    def __init__(self, log_level: str, stream: TextIO) -> None:
        self._least, self._stream = _LEVELS.index(log_level), stream
        self._secrets = secret_values()
        self._lock = threading.Lock()

    def say(self, text: str, level: str = "info", **fields: Any) -> None:
        self._write(level, {"message": text, **fields})

    def stage_started(self, stage: str) -> None:
        self._write("info", {"event": "stage_started", "stage": stage})

    def stage_ended(self, record: StageRecord) -> None:
        self._write("info", {"event": "stage_ended", **_as_fields(record)})

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        self._write("info", {"stage": stage, **event})

    def summary(self, records: list[StageRecord], closing: str) -> None:
        self._write(
            "info", {"event": "run_ended", "message": closing, "stages": [_as_fields(record) for record in records]}
        )

    def _write(self, level: str, fields: dict[str, Any]) -> None:
        if _LEVELS.index(level) < self._least:
            return
        line = json.dumps({"time": now(), "level": level, **fields}, ensure_ascii=False, default=str)
        with self._lock, contextlib.suppress(OSError):  # nobody may be reading any more: no reason to lose the work
            self._stream.write(masked(line, self._secrets) + "\n")
            self._stream.flush()


class TextConsole:
    """For a person: a bar with rate, loss and time left, then a table. Without a terminal, plain lines."""

    def __init__(self, log_level: str, stream: TextIO) -> None:
        self._least = _LEVELS.index(log_level)
        self._secrets = secret_values()
        self._rich = RichConsole(file=stream, highlight=False, soft_wrap=not stream.isatty())
        self._bar: Progress | None = None
        self._last_line = 0.0

    def say(self, text: str, level: str = "info", **fields: Any) -> None:
        if _LEVELS.index(level) >= self._least:
            prefix = f"{level}: " if level in ("warning", "error") else ""
            self._print(f"  {prefix}{text}", _STYLES[level])

    def stage_started(self, stage: str) -> None:
        self._print(f"▸ {stage}", "bold")

    def stage_ended(self, record: StageRecord) -> None:
        self._close_bar()
        if record.result not in ("done", "skipped"):
            self._print(f"  {record.stage}: {record.result}", "bold red")

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        figures = "  ".join(
            f"{name} {_short(value)}"
            for name, value in event.items()
            if name not in ("event", "done", "total", "unit", "evaluated")
        )
        if not self._rich.is_terminal:
            if time.monotonic() - self._last_line > 10 or event["done"] >= event["total"]:
                self._last_line = time.monotonic()
                self._print(f"  {event['done']:g}/{event['total']:g} {event['unit']}  {figures}", "")
            return
        if self._bar is None:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self._rich, transient=True)
            self._bar.start()
            self._bar.add_task(stage, total=event["total"], count="", figures="")
        task = self._bar.task_ids[0]
        count = f"{_short(event['done'])}/{_short(event['total'])} {event['unit']}"
        self._bar.update(task, completed=event["done"], total=event["total"], count=count, figures=escape(figures))

    def summary(self, records: list[StageRecord], closing: str) -> None:
        self._close_bar()
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("stage", "result", "time", "output"):
            table.add_column(title, overflow="fold", no_wrap=title != "output")
        for record in records:
            seconds = f"{record.seconds:.1f} s" if record.seconds else ""
            table.add_row(
                record.stage,
                record.result,
                seconds,
                escape(masked("\n".join(record.outputs).replace(f"{Path.cwd()}/", ""), self._secrets)),
            )
        self._rich.print()
        self._rich.print(table)
        self._print(closing, "bold")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str, style: str) -> None:
        self._rich.print(escape(masked(text, self._secrets)), style=style)


def _as_fields(record: StageRecord) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "result": record.result,
        "seconds": round(record.seconds, 3),
        "outputs": record.outputs,
    }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
