"""When to save: often enough that a lost machine costs little, rarely enough that saving costs little."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from job.run import read_json

LARGEST_SHARE = 0.01  # of the training time, spent in saving
LEAST_SECONDS, MOST_SECONDS = 30.0, 600.0  # between two saves
_MARGIN = 1.5  # saves and uploads vary


class SavePace:
    """Measures how long a save takes, reads how long its upload took, and answers from that.

    A save stops the training, an upload does not. The interval is as short as LARGEST_SHARE allows, at most
    MOST_SECONDS, and never shorter than an upload, which could not keep up. (Daly 2006, "A higher order estimate of
    the optimum checkpoint interval", needs a failure rate, which nobody knows of a machine rented by the hour.)
    """

    def __init__(self, upload_timing_file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._timing_file = upload_timing_file
        self._clock = clock
        self._save_seconds = 0.0
        self._last = clock()

    def saved(self, seconds: float) -> None:
        """The trainer has written a checkpoint, which took so long."""
        self._save_seconds, self._last = seconds, self._clock()

    def due(self) -> bool:
        """Whether the interval since the last save, or since the start, is over."""
        return self._clock() - self._last >= self.interval_seconds()

    def interval_seconds(self) -> float:
        return max(
            LEAST_SECONDS, _MARGIN * self._upload_seconds(), min(MOST_SECONDS, self._save_seconds / LARGEST_SHARE)
        )

    def fits(self, deadline: float) -> bool:
        """Whether a save begun now would be in the store at `deadline` (seconds since the epoch).

        Before the first save nothing is known, and trying costs nothing: what is not committed does not count.
        """
        return time.time() + _MARGIN * (self._save_seconds + self._upload_seconds()) <= deadline

    def _upload_seconds(self) -> float:
        try:
            return float(read_json(self._timing_file)["seconds"])
        except (FileNotFoundError, KeyError, ValueError):
            return 0.0
