"""Markers of stages whose files stay on this disk, made while the next stage is at work.

A marker lists every file's SHA-256, and to read the 13.5 GB of a 7B takes ten seconds in which the GPU would wait.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from job.stages import Stage

GoOn = Callable[[], None]  # called again and again while files are hashed; raises when that is to end


class Completions:
    """Calls `complete` for one stage after the other, in a thread of its own.

    After a failure no stage is completed; `on_failure` is called with it at once, and `settle` raises it.
    """

    def __init__(self, complete: Callable[[Stage, GoOn], None], on_failure: Callable[[Exception], None]) -> None:
        self._complete, self._on_failure = complete, on_failure
        self._stages: queue.Queue[Stage] = queue.Queue()
        self._failure: Exception | None = None
        self._abandoned = False
        self._thread: threading.Thread | None = None

    def add(self, stage: Stage) -> None:
        """Complete `stage` behind those that were added before; returns at once."""
        self._stages.put(stage)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="completions", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Return when every stage that was added is complete; raises what one of them failed with."""
        self._stages.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Complete nothing any more. When this returns, nothing is written."""
        self._abandoned = True
        self._stages.join()

    def _work(self) -> None:
        while True:
            stage = self._stages.get()
            try:
                if self._failure is None:
                    self._go_on()
                    self._complete(stage, self._go_on)
            except _Abandoned:
                pass
            except Exception as error:
                self._failure = error
                self._on_failure(error)
            finally:
                self._stages.task_done()

    def _go_on(self) -> None:
        if self._abandoned:
            raise _Abandoned


class _Abandoned(Exception):
    """The start is over: what it has not completed, the next one does again."""
