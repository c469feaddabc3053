"""What ends a start early: a stop request, or a loss after which nothing more that it does would count."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from job.errors import Stopped
from job.run import Run
from job.supervision.process import StageProcess
from job.supervision.stop import StopRequest

_POLL_SECONDS = 0.5


class Interruption:
    """Knows which stage's process is running, and kills it when the start must end.

    A start is lost when another attempt has taken over, another node is gone, or the sources are not those the run
    started with. Other threads report this.
    """

    def __init__(self, run: Run, say: Callable[[str], None], stalled: Callable[[], bool] = lambda: False) -> None:
        self.stop = StopRequest(run, self._kill, say, self._doing, stalled)
        self._lost: Exception | None = None
        self._process: StageProcess | None = None

    def lose(self, reason: Exception) -> None:
        """End the start with `reason`. Any thread may call this."""
        self._lost = reason
        self._kill()

    @contextlib.contextmanager
    def may_kill(self, process: StageProcess) -> Iterator[None]:
        """Within this block, a stop or a loss kills `process`. The process does not outlive the block."""
        self._process = process
        try:
            self.refuse_if_lost()  # a loss from here on kills the process
            yield
        finally:
            self._process = None
            process.kill()

    def refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def refuse_if_ending(self) -> None:
        """Raise if the start is lost or was asked to stop."""
        self.refuse_if_lost()
        if self.stop.requested:
            raise Stopped("Stopped on request.", "Start the job again to resume.")

    def wait(self) -> None:
        """Sleep briefly on behalf of a caller that is waiting. Raises if the start must end."""
        self.refuse_if_ending()
        time.sleep(_POLL_SECONDS)

    def _doing(self) -> str:
        process = self._process
        if process is None:
            return "storing what is done"
        if process.stage.per_gpu:
            return "finishing this step and storing a checkpoint"
        return f"ending stage {process.stage.name}"

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
