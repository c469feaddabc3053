"""Writes the markers of stages whose files stay on this disk, while the next stage runs.

A marker lists the SHA-256 of every file. Reading the 13.5 GB of a 7B model takes ten seconds, and the GPU would wait.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from job.checkpoints.syncer import give_way

GoOn = Callable[[], None]  # called repeatedly while files are hashed; raises to end the hashing
Completion = Callable[[GoOn], None]


class BackgroundHashing:
    """A thread that runs one completion after the other.

    After a failure it runs no more. The failure goes to `on_failure` immediately, and `settle` raises it. `failed` names
    what was to be completed, and `undone` everything that is not complete, or not yet.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._waiting: queue.Queue[tuple[str, Completion]] = queue.Queue()
        self.failed: str | None = None
        self.undone: set[str] = set()
        self._failure: Exception | None = None
        self._abandoned = False
        self._thread: threading.Thread | None = None

    def add(self, name: str, completion: Completion) -> None:
        """Queue a completion after those added before. Returns immediately."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="background-hashing", daemon=True)
            thread.start()
            self._thread = thread
        self.undone.add(name)
        self._waiting.put((name, completion))

    def settle(self) -> None:
        """Return when everything that was added is done. Raises what failed."""
        self._waiting.join()
        if self._failure is not None:
            raise self._failure

    def settle_quietly(self) -> None:
        """Return when everything that was added is done or has failed."""
        self._waiting.join()

    def abandon(self, *, wait: bool = True) -> None:
        """Run nothing more. Once this returns, nothing is written; without `wait`, nothing new is started."""
        self._abandoned = True
        if wait:
            self._waiting.join()

    def _work(self) -> None:
        give_way()
        while True:
            name, completion = self._waiting.get()
            try:
                if self._failure is None:
                    self._go_on()
                    completion(self._go_on)
                    self.undone.discard(name)
            except _Abandoned:
                pass
            except Exception as error:
                self.failed, self._failure = name, error
                with contextlib.suppress(Exception):  # if the thread died, its callers would wait forever
                    self._on_failure(error)
            finally:
                self._waiting.task_done()

    def _go_on(self) -> None:
        if self._abandoned:
            raise _Abandoned


class _Abandoned(Exception):
    """The start is over. The next one repeats what is not complete."""
