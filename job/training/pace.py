"""When to save: so often that losing the machine costs little, and so rarely that saving costs little."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from job.run import read_json

LARGEST_SHARE = 0.01  # of the training time may be spent on saving
LEAST_SECONDS, MOST_SECONDS = 30.0, 600.0  # between two saves
_MARGIN = 1.5  # saves and uploads vary


class SavePace:
    """Decides when to save, from how long saves and uploads take.

    A save stops the training, an upload does not. The interval is as short as LARGEST_SHARE allows, at most
    MOST_SECONDS, and never shorter than an upload, which could not keep up otherwise. (Daly 2006, "A higher order
    estimate of the optimum checkpoint interval", needs a failure rate, which nobody knows for a machine rented by the
    hour.)
    """

    def __init__(self, upload_timing_file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._timing_file = upload_timing_file
        self._clock = clock
        self.save_seconds = 0.0  # of the last save
        self._last = clock()

    def saved(self, seconds: float) -> None:
        """Call this when the trainer has written a checkpoint, with the seconds that it took."""
        self.save_seconds, self._last = seconds, self._clock()

    def due(self) -> bool:
        """Whether the interval has passed since the last save, or since the start."""
        return self._clock() - self._last >= self.interval_seconds()

    def interval_seconds(self) -> float:
        return max(
            LEAST_SECONDS, _MARGIN * self._upload_seconds(), min(MOST_SECONDS, self.save_seconds / LARGEST_SHARE)
        )

    def fits(self, deadline: float) -> bool:
        """Whether a save started now would be in the store at `deadline` (seconds since the epoch).

        Before the first save nothing is known, so the answer is optimistic. Trying costs nothing, since only committed
        checkpoints count.
        """
        return time.time() + _MARGIN * (self.save_seconds + self._upload_seconds()) <= deadline

    def _upload_seconds(self) -> float:
        try:
            return float(read_json(self._timing_file)["seconds"])
        except (FileNotFoundError, KeyError, ValueError):
            return 0.0
