"""Notices a stage that does nothing, which would otherwise be paid for until somebody looks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from job.errors import NodeError
from job.report.metrics import Metrics
from job.supervision.process import StageProcess

_LOOKS = 10  # at a process within the time that a stall takes
_SLOWEST_LOOK_SECONDS = 10.0
_LEAST_WORK = 0.005  # of the time: a process that only waits takes less


class StallWatch:
    """Calls `on_stall` once if a stage makes no progress for `seconds`.

    Training's progress is its steps and evaluated batches: processes that wait for each other on GPUs are busy all the
    time. Any other stage's progress is what it reports, and the work of its processes: one that waits for a server that
    never answers does none.
    """

    def __init__(self, metrics: Metrics, seconds: float, on_stall: Callable[[Exception], None]) -> None:
        self._metrics, self._seconds, self._on_stall = metrics, seconds, on_stall

    @contextlib.contextmanager
    def watching(self, process: StageProcess) -> Iterator[None]:
        """Watch within this block, from a thread."""
        over = threading.Event()
        self._metrics.working(True)
        watch = threading.Thread(target=self._watch, args=(process, over), name="stall", daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            self._metrics.working(False)

    def _watch(self, process: StageProcess, over: threading.Event) -> None:
        stage = process.stage
        worked, since = process.activity(), time.monotonic()
        while not over.wait(min(self._seconds / _LOOKS, _SLOWEST_LOOK_SECONDS)):
            if not stage.per_gpu:
                done, elapsed = process.activity() - worked, time.monotonic() - since
                if abs(done) > _LEAST_WORK * elapsed:  # it falls when one of several processes has ended
                    worked, since = worked + done, time.monotonic()
                    self._metrics.moved()
            if self._metrics.healthy():
                continue
            self._on_stall(stalled(stage.name, self._metrics.stalled_seconds()))
            return


def stalled(stage: str, seconds: float) -> NodeError:
    """What ends a start whose stage does nothing."""
    return NodeError(
        f"Stage {stage} has made no progress for {seconds:.0f} s.",
        "Start the job again elsewhere: this machine, its GPU or its network hangs. If the stage is only slow, raise FT_STALL_SECONDS.",
    )
