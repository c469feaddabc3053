"""Counts, on this disk, starts in a row that stored nothing new.

The lease counts them too, for machines that come and go. This count also works while the store itself is what fails.
"""

from __future__ import annotations

import contextlib

from job.errors import NoProgress
from job.run import Run, read_json, write_json


class IdleStarts:
    """The starts of this run on this disk since something was last stored."""

    def __init__(self, run: Run) -> None:
        self._run, self._file = run, run.paths.starts_file

    def begin(self) -> None:
        """Count this start. Raises NoProgress if as many as FT_MAX_IDLE_STARTS allows came before it."""
        idle, last = 0, ""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = read_json(self._file)
            idle, last = int(found["idle"]), str(found["ended"])
        refuse(self._run, idle, last)
        with contextlib.suppress(OSError):  # a full disk has its own error
            write_json(self._file, {"idle": idle + 1, "ended": last})

    def ended(self, why: str) -> None:
        """Note how this start ended, for the message of a later one."""
        with contextlib.suppress(OSError, ValueError):
            write_json(self._file, read_json(self._file) | {"ended": why[:500]})

    def stored(self) -> None:
        """Something new is in the store."""
        with contextlib.suppress(OSError):
            write_json(self._file, {"idle": 0, "ended": ""})


def refuse(run: Run, idle: int, last: str) -> None:
    """Raise NoProgress if `idle` starts in a row without anything new in the store are too many."""
    most = run.settings.max_idle_starts
    if most and idle >= most:
        raise NoProgress(
            f"{idle} starts of this run in a row have stored nothing new."
            + (f" The last one ended with: {last}" if last else ""),
            "Find out why before more is paid for. Then start it once with FT_MAX_IDLE_STARTS=0, which sets no limit.",
        )
