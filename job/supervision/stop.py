"""Stop requests, which come from a signal or from the scheduler's time limit, and the deadline they set."""

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
    """Whether the job was asked to stop, and its deadline for that.

    A reserve of the grace time is kept for the supervisor's own exit. At `deadline` the stage is killed. A little later
    this process exits with code 75, whatever it is doing. What is not committed by then does not count, so exiting
    midway is always safe. `kill` kills the running stage, and `say` informs a person.
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
        """Whether the time that a stop request allowed has run out."""
        return self.deadline is not None and time.time() > self.deadline

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Within this block, signals and the scheduler's time limit become stop requests."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        timer = self._at_time_limit()
        try:
            yield
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """From now on, pass requests on to the stages through the stop file.

        Only the one start that works in the folder may call this. Another start's file must stay as it is.
        """
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
        """On the first signal, ask the stage to stop and enforce the deadline. On a later one, kill it immediately."""
        if self.deadline is None:
            self._request()
        elif time.time() > self._requested_at + _REPEAT_SECONDS:  # schedulers tend to signal twice
            self._kill()

    def _request(self) -> None:
        self._requested_at = time.time()
        self.deadline = self._requested_at + self._grace - self._reserve
        for act in (self._kill_in_time, self._leave_in_time):  # in their own threads, since writing may fail or block
            threading.Thread(target=act, daemon=True).start()
        if self._passed_on:
            try:
                write_json(self._run.paths.stop_file, self.deadline)
            except OSError:  # on a full disk the stage cannot be told
                self._kill()

    def _kill_in_time(self) -> None:
        time.sleep(self._grace - self._reserve)
        self._kill()
        time.sleep(self._reserve * 0.7)
        self._say("Stopped in the middle of a transfer. Start the job again.")

    def _leave_in_time(self) -> None:
        """Exit. Only a transfer can still be running, and without its manifest it does not count."""
        time.sleep(self._grace - self._reserve * 0.2)
        os._exit(ExitCode.TRY_AGAIN)
