"""The supervisor's output: a live progress bar on a terminal, one JSON object per line elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from job.guard.escape import for_terminal, json_line
from job.guard.secrets import masked, masked_fields, secret_values
from job.run import now

_LEVELS = ("debug", "info", "warning", "error")
_STAGE_WIDTH, _RESULT_WIDTH = 11, 11
_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}


@dataclass
class StageRecord:
    """One row of the final table."""

    stage: str
    result: str
    seconds: float = 0.0
    outputs: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # the numbers in `outputs`, for programs


class Console(Protocol):
    def say(self, text: str, level: str = "info", **fields: Any) -> None: ...
    def stage_started(self, stage: str) -> None: ...
    def stage_ended(self, record: StageRecord) -> None: ...
    def progress(self, stage: str, event: dict[str, Any]) -> None: ...
    def summary(self, records: list[StageRecord], closing: str, *, exit_code: int, reason: str) -> None: ...


def is_text(log_format: str, stream: TextIO) -> bool:
    """Whether a person reads this stream: on a terminal and in Slurm's log, unless the setting says otherwise."""
    return log_format == "text" or (log_format != "json" and (stream.isatty() or "SLURM_JOB_ID" in os.environ))


def open_console(log_format: str, log_level: str, run_id: str, stream: TextIO = sys.stdout) -> Console:
    """Open the console. `auto` is text where a person reads it, which is a terminal or Slurm's log, and JSON elsewhere."""
    text = is_text(log_format, stream)
    return TextConsole(log_level, stream) if text else JsonConsole(log_level, run_id, stream)


class JsonConsole:
    """Writes one JSON object per line, each with time and level."""

    def __init__(self, log_level: str, run_id: str, stream: TextIO) -> None:
        self._least, self._run_id, self._stream = _LEVELS.index(log_level), run_id, stream
        self._secrets = secret_values()
        self._lock = threading.Lock()

    def say(self, text: str, level: str = "info", **fields: Any) -> None:
        self._write(level, {"message": text, **fields})

    def stage_started(self, stage: str) -> None:
        self._write("info", {"event": "stage_started", "stage": stage, "message": f"Stage {stage} started."})

    def stage_ended(self, record: StageRecord) -> None:
        message = f"Stage {record.stage}: {record.result} after {record.seconds:.1f} s."
        self._write("info", {"event": "stage_ended", **_as_fields(record), "message": message})

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        message = f"{stage}: {_short(event['done'])} of {_short(event['total'])} {event['unit']}"
        self._write("info", {"stage": stage, **event, "message": message})

    def summary(self, records: list[StageRecord], closing: str, *, exit_code: int, reason: str) -> None:
        ended = {"event": "run_ended", "message": closing, "exit_code": exit_code, "reason": reason}
        self._write("info", {**ended, "stages": [_as_fields(record) for record in records]})

    def _write(self, level: str, fields: dict[str, Any]) -> None:
        if _LEVELS.index(level) < self._least:
            return
        named = {"time": now(), "level": level, "run_id": self._run_id, **fields}
        line = json_line(masked_fields(named, self._secrets))
        with self._lock, contextlib.suppress(OSError):  # nobody may be reading any more; the work goes on
            self._stream.write(line + "\n")
            self._stream.flush()


class TextConsole:
    """Writes for a person: a bar with rate, loss and time left, then a table. Without a terminal, plain lines."""

    def __init__(self, log_level: str, stream: TextIO) -> None:
        self._least = _LEVELS.index(log_level)
        self._secrets = secret_values()
        self._rich = RichConsole(file=stream, highlight=False)
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
            self._print(f"  {record.stage}: {record.result}", "yellow" if record.result == "stopped" else "bold red")

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        figures = "  ".join(
            f"{name} {_short(value)}"
            for name, value in event.items()
            if name
            not in (
                "event",
                "done",
                "total",
                "unit",
                "evaluated",
                "eval_loss",
                "grad_norm",
                "tokens",
            )  # the line is short
        )
        if not self._rich.is_terminal:
            if time.monotonic() - self._last_line > 10 or event["done"] >= event["total"]:
                self._last_line = time.monotonic()
                count = f"{_short(event['done'])}/{_short(event['total'])} {event['unit']}"
                self._print(f"  {count}  {figures}".rstrip(), "")
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

    def summary(self, records: list[StageRecord], closing: str, *, exit_code: int, reason: str) -> None:
        """The table. Lines are never folded here: a terminal folds them itself, and a copied path stays whole."""
        self._close_bar()
        self._print("", "")
        for record in records:
            seconds = f"{record.seconds:.1f} s" if record.seconds else ""
            self._print(f"{record.stage:<{_STAGE_WIDTH}}{record.result:<{_RESULT_WIDTH}}{seconds:>9}".rstrip(), "")
            for line in record.outputs:
                self._print(f"{'':<{_STAGE_WIDTH}}{line.replace(f'{Path.cwd()}/', '')}", "dim")
        self._print(closing, "bold")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str, style: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone; the work goes on
            self._rich.print(escape(for_terminal(masked(text, self._secrets))), style=style, soft_wrap=True)


def _as_fields(record: StageRecord) -> dict[str, Any]:
    return {
        "stage": record.stage,
        "result": record.result,
        "seconds": round(record.seconds, 3),
        "outputs": record.outputs,
        "figures": record.figures,
    }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
