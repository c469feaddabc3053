"""Stop requests: from a signal, or from the clock of a scheduler that will end the job; and the deadline they set."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from job.errors import ExitCode
from job.run import Run, write_json

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS = 2.0
_LONGEST_RESERVE_SECONDS = 3.0


class StopRequest:
    """Whether the job is asked to stop, and by when it must have.

    Of the grace time a reserve is kept for the supervisor's own end: at `deadline` the stage is killed, and a little
    later this process leaves with exit code 75, whatever it is doing. What is not committed then does not count, so
    leaving in the middle is always legal. `kill` ends the running stage; `say` tells a person.
    """

    def __init__(self, run: Run, kill: Callable[[], None], say: Callable[[str], None]) -> None:
        self._run, self._kill, self._say = run, kill, say
        self._grace = run.settings.stop_grace_seconds
        self._reserve = min(_LONGEST_RESERVE_SECONDS, self._grace / 4)
        self._requested_at = 0.0
        self._passed_on = False
        self.deadline: float | None = None

    @property
    def requested(self) -> bool:
        return self.deadline is not None

    @property
    def over(self) -> bool:
        """Whether the time that a stop request left has run out."""
        return self.deadline is not None and time.time() > self.deadline

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Within this, signals and the scheduler's time limit become requests."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        timer = self._at_time_limit()
        try:
            yield
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """From now on a request reaches the stages, by the stop file. Call it as the one start that works in the
        folder: another's file is neither to be removed nor written."""
        self._run.paths.stop_file.unlink(missing_ok=True)
        self._passed_on = True

    def _at_time_limit(self) -> threading.Timer:
        ends = self._run.node.ends_at
        timer = threading.Timer(max(0.0, (ends or 0.0) - self._grace - time.time()), self._on_time_limit)
        timer.daemon = True
        if ends is not None:
            timer.start()
        return timer

    def _on_time_limit(self) -> None:
        if self.deadline is None:
            self._request()
            self._say(f"The scheduler's time limit is {self._grace:g} s away: stopping.")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """First signal: ask the stage to stop, and see to it that it does. One more after a while: at once."""
        if self.deadline is None:
            self._request()
        elif time.time() > self._requested_at + _REPEAT_SECONDS:  # schedulers tend to signal twice
            self._kill()

    def _request(self) -> None:
        self._requested_at = time.time()
        self.deadline = self._requested_at + self._grace - self._reserve
        for act in (self._kill_in_time, self._leave_in_time):  # threads of their own, since writing may fail or block
            threading.Thread(target=act, daemon=True).start()
        if self._passed_on:
            try:
                write_json(self._run.paths.stop_file, self.deadline)
            except OSError:  # a full disk: the stage cannot be told
                self._kill()

    def _kill_in_time(self) -> None:
        time.sleep(self._grace - self._reserve)
        self._kill()
        time.sleep(self._reserve * 0.7)
        self._say("Stopped in the middle of a transfer; start the job again.")

    def _leave_in_time(self) -> None:
        """Only a transfer to or from the store can still be under way; it counts for nothing without its manifest."""
        time.sleep(self._grace - self._reserve * 0.2)
        os._exit(ExitCode.TRY_AGAIN)
