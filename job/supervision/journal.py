"""What one start reports: log lines, metrics, and the closing table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from job.errors import Stopped, exit_code_of
from job.report.console import Console, StageRecord
from job.report.metrics import Metrics
from job.run import Run
from job.stages import Stage


class Journal:
    """Reports what happens in a start: to a person or a log collector, and to Prometheus."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self.say = console.say
        gpus = run.processes_per_node if run.settings.device == "cuda" else 0
        self.metrics = Metrics(run.id, run.settings.stall_seconds, gpus=gpus, stores=run.node.leads)
        self._records: list[StageRecord] = []
        self._xids: set[tuple[int, int]] = set()

    def warn(self, text: str) -> None:
        self.say(text, "warning")

    def gpu_failed(self, gpu: int, xid: int) -> None:
        """The driver has reported an error of a GPU. It may do so hundreds of times, and is quoted once."""
        self.metrics.gpu_failed(gpu, xid)
        if (gpu, xid) not in self._xids:
            self._xids.add((gpu, xid))
            self.warn(f"The driver reports Xid {xid} of GPU {gpu}. See docs.nvidia.com/deploy/xid-errors.")

    def serve_metrics(self) -> None:
        """Serve metrics on FT_METRICS_PORT. A port in use is only a warning, since several jobs may share a machine."""
        port = self._run.settings.metrics_port
        if port is None:
            return
        try:
            self.metrics.serve(self._run.settings.metrics_address, port)
        except OSError as error:
            self.warn(f"No metrics: FT_METRICS_PORT={port} cannot be used: {error.strerror}.")

    @contextlib.contextmanager
    def stage(self, stage: Stage) -> Iterator[StageRecord]:
        """Record the stage that runs within this block as done, stopped or failed."""
        self._console.stage_started(stage.name)
        self.metrics.stage(stage.name)
        record = StageRecord(stage.name, "failed")
        self._records.append(record)
        started = time.monotonic()
        try:
            yield record
            record.result = "done"
        except Stopped:
            record.result = "stopped"
            raise
        finally:
            record.seconds = time.monotonic() - started
            self.metrics.stage(None)
            self._console.stage_ended(record)

    def skipped(self, stage: Stage) -> None:
        self._records.append(StageRecord(stage.name, "skipped"))

    def progress(self, stage: Stage, event: dict[str, Any], *, shown: bool) -> None:
        """Report a stage's progress. `shown` is False if another node shows it."""
        self.metrics.progress(stage.name, event)
        if shown:
            self._console.progress(stage.name, event)

    def close(self, closing: str, error: BaseException | None, *, unhashed: set[str], failed: str | None) -> None:
        """Print the closing table. Stages that are `unhashed` do not count, and the next start repeats them."""
        for record in self._records:
            if record.stage in unhashed:
                record.result = "failed" if record.stage == failed else "unfinished"
        if self._records:
            self._console.summary(self._records, closing, exit_code=int(exit_code_of(error)), reason=_reason(error))


def _reason(error: BaseException | None) -> str:
    return "" if error is None else getattr(error, "message", None) or f"{type(error).__name__}: {error}"
