"""Stop requests, which come from a signal or from the scheduler's time limit, and the deadline they set."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from job.cluster import time_limit
from job.errors import ExitCode
from job.run import Run, write_json

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_REPEAT_SECONDS = 2.0
_LONGEST_RESERVE_SECONDS = 3.0


class StopRequest:
    """Whether the job was asked to stop, and its deadline for that.

    A reserve of the grace time is kept for the supervisor's own exit. At `deadline` the stage is killed. A little later
    this process exits with code 75, whatever it is doing. What is not committed by then does not count, so exiting
    midway is always safe. `kill` kills the running stage, `say` informs a person, `doing` says what a stop will do now,
    and `stalled` whether the stage hangs. A stop while it hangs is a liveness probe's: it ends with 69, so that it counts.
    """

    def __init__(
        self,
        run: Run,
        kill: Callable[[], None],
        say: Callable[[str], None],
        doing: Callable[[], str] = lambda: "storing what is done",
        stalled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run, self._kill, self._say, self._doing, self._is_stalled = run, kill, say, doing, stalled
        self._grace = run.settings.stop_grace_seconds
        self._reserve = min(_LONGEST_RESERVE_SECONDS, self._grace / 4)
        self._requested_at = 0.0
        self._passed_on = False
        self.deadline: float | None = None
        self.while_stalled = False  # the stage was hanging when the request came

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
        heeded = [
            number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP
        ]
        before = {number: signal.signal(number, self._on_signal) for number in heeded}  # nohup's wish is kept
        try:
            with self._at_time_limit():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self) -> None:
        """From now on, pass requests on to the stages through the stop file.

        Only the one start that works in the folder may call this. Another start's file must stay as it is.
        """
        self._run.paths.stop_file.unlink(missing_ok=True)
        self._passed_on = True

    @contextlib.contextmanager
    def _at_time_limit(self) -> Iterator[None]:
        """Within this block, request a stop when the scheduler's time limit is near."""
        over = threading.Event()
        if self._run.node.ends_at is not None:
            threading.Thread(target=self._watch_time_limit, args=(over,), name="time limit", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch_time_limit(self, over: threading.Event) -> None:
        """Wait for the limit as it is then: it may be extended while the job runs."""
        while (left := (time_limit() or self._run.node.ends_at or 0.0) - self._grace - time.time()) > 0:
            if over.wait(left):
                return
        if self.deadline is None and not over.is_set():
            self._request(f"The scheduler's time limit is {self._grace:g} s away")

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """On the first signal, ask the stage to stop and enforce the deadline. On a later one, kill it immediately."""
        if self.deadline is None:
            self._request("Stopping" if number == signal.SIGINT else f"Stopping ({signal.Signals(number).name})")
        elif time.time() > self._requested_at + _REPEAT_SECONDS:  # schedulers tend to signal twice
            self._kill()

    def _request(self, why: str) -> None:
        self._requested_at = time.time()
        self.while_stalled = self._is_stalled()
        self.deadline = self._requested_at + self._grace - self._reserve
        told = f"{why}: {self._doing()}, at most {self._grace:g} s. Ask again to quit now."
        # In their own threads: writing may fail or block, and what a signal interrupts may hold the console's lock.
        for act in (lambda: self._say(told), self._kill_in_time, self._leave_in_time):
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
        os._exit(ExitCode.NODE_UNFIT if self.while_stalled else ExitCode.TRY_AGAIN)
