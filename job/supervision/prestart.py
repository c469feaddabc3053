"""Processes of later stages, started during earlier ones: importing their libraries takes longer than some stages."""

from __future__ import annotations

from collections.abc import Callable

from job.run import Run
from job.stages import STAGES, Stage, turn
from job.supervision.process import StageProcess


class Prestarted:
    """Starts the processes of `missing` stages ahead of their turn. They die with this process."""

    def __init__(self, run: Run, missing: set[str], warn: Callable[[str], None]) -> None:
        self._run, self._warn = run, warn
        self._to_start = [stage for stage in STAGES if stage.name in missing and not _meets_others(run, stage)]
        self._waiting: dict[str, StageProcess] = {}
        if self._to_start:
            turn.clear(run)

    def take(self, stage: Stage) -> StageProcess | None:
        """Return the process that waits for this stage's turn, or None. Starts those that start with this stage."""
        process = self._waiting.pop(stage.name, None)
        self._waiting |= {
            other.name: StageProcess(self._run, other, early=True)
            for other in self._to_start
            if other.starts_with == stage.name
        }
        if process is not None and not process.is_running():
            self._warn(
                f"The process waiting for stage {stage.name} exited with {process.wait()} before its turn. Starting another."
            )
            return None
        return process

    def kill(self) -> None:
        for process in self._waiting.values():
            process.kill()


def _meets_others(run: Run, stage: Stage) -> bool:
    """Whether its processes must first learn where those of the other nodes are."""
    return stage.per_gpu and run.node.count > 1
