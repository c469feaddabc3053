"""Markers of stages whose files stay on this disk, made while the next stage is at work.

A marker lists every file's SHA-256, and to read the 13.5 GB of a 7B takes ten seconds in which the GPU would wait.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from job.checkpoints.syncer import give_way

GoOn = Callable[[], None]  # called again and again while files are hashed; raises when that is to end
Completion = Callable[[GoOn], None]


class BackgroundHashing:
    """Does one completion after the other, in a thread of its own.

    After a failure none is done any more; `on_failure` is called with it at once, `settle` raises it, and `failed` is the name of
    what was to be completed. `undone` are the names of all that is not, or not yet.
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
        """Do it behind those that were added before; returns at once."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="background-hashing", daemon=True)
            thread.start()
            self._thread = thread
        self.undone.add(name)
        self._waiting.put((name, completion))

    def settle(self) -> None:
        """Return when all that was added is done; raises what failed."""
        self._waiting.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Do nothing any more. When this returns, nothing is written."""
        self._abandoned = True
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
                with contextlib.suppress(Exception):  # a dead thread would leave everybody waiting
                    self._on_failure(error)
            finally:
                self._waiting.task_done()

    def _go_on(self) -> None:
        if self._abandoned:
            raise _Abandoned


class _Abandoned(Exception):
    """The start is over: what is not complete, the next one does again."""
