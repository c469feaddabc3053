"""Training, as the supervisor sees it: what it resumes from, how its processes start, and when to try another way."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from job.checkpoints.lease import Lease
from job.checkpoints.restore import committed_checkpoints, local_checkpoints, local_step, step_of
from job.errors import JobError, KernelsFault, MemoryFull
from job.nodes.rendezvous import FirstNode
from job.run import Run
from job.supervision.checkpointing import Checkpointing
from job.supervision.process import Launch


class Training(Protocol):
    """What the supervisor needs from training on this machine."""

    launch: Launch

    def prepare(self) -> None:
        """Restore what training resumes from."""

    def watched(self, on_lost: Callable[[Exception], None]) -> contextlib.AbstractContextManager[None]:
        """Within this block, report a node that is gone."""

    def moved(self) -> None:
        """Training has taken a step."""

    def offer(self, step: int, folder: Path, save_seconds: float) -> None:
        """A checkpoint is complete on the local disk. The training waited `save_seconds` for it."""

    def finish(self) -> None:
        """The processes have exited: store what is left to store."""

    def why(self, error: JobError) -> JobError:
        """What ended training: `error`, or what happened on another node."""

    def adapt(self, error: MemoryFull | KernelsFault) -> str | None:
        """Change `launch` so that `error` does not recur. Returns how, or None if no other way is left."""

    def resumes_from(self) -> str:
        """What a user must do to resume after a stop, and where training resumes."""


class LeadTraining:
    """Training on the only node, or on the first. It holds the lease, and restores and stores the checkpoints."""

    def __init__(self, run: Run, checkpointing: Checkpointing, lease: Lease, nodes: FirstNode | None) -> None:
        self._run, self._checkpointing, self._lease, self._nodes = run, checkpointing, lease, nodes
        self.launch = Launch()
        self._kernels_fetched = False

    def prepare(self) -> None:
        if not self._kernels_fetched:
            self._checkpointing.fetch_kernels()
            self._kernels_fetched = True
        shutil.rmtree(self._run.paths.stage_dir("train"), ignore_errors=True)
        commit = self._checkpointing.resume(self._lease)
        if self._nodes is not None:
            self._nodes.gather()
            self.launch = replace(self.launch, rendezvous=self._nodes.announce(commit))

    def watched(self, on_lost: Callable[[Exception], None]) -> contextlib.AbstractContextManager[None]:
        return self._nodes.watched(on_lost) if self._nodes is not None else contextlib.nullcontext()

    def moved(self) -> None:
        if self._nodes is not None:
            self._nodes.moved()

    def offer(self, step: int, folder: Path, save_seconds: float) -> None:
        self._checkpointing.offer(step, folder, save_seconds)

    def finish(self) -> None:
        self._checkpointing.finish()

    def why(self, error: JobError) -> JobError:
        return self._nodes.why(error) if self._nodes is not None else error

    def adapt(self, error: MemoryFull | KernelsFault) -> str | None:
        """Choose how to start training again from the last checkpoint. Several nodes leave that to their scheduler.

        Ranks that train together cannot repeat a step that one of them left in the middle of a reduction. And no rank
        survives a kernel's fault.
        """
        if self._nodes is not None or not self.launch.kernels:
            return None
        if isinstance(error, MemoryFull):
            self.launch = replace(self.launch, plan_steps_down=self.launch.plan_steps_down + 1)
            return "with a smaller plan"
        self.launch = replace(self.launch, kernels=False)
        return "without the job's own kernels, which is slower"

    def resumes_from(self) -> str:
        here = [local_step(folder) for folder in local_checkpoints(self._run)]
        stored = [step_of(commit) for commit in committed_checkpoints(self._run, self._lease.record)]
        if not stored and not here:
            return "Start the job again. No checkpoint is stored yet."
        if max(here, default=0) > max(stored, default=0):
            return (
                f"Start the job again on this machine: it resumes from step {max(here)}, which the store does not have."
            )
        return f"Start the job again: it resumes from step {max(stored)}."
