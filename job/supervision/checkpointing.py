"""Training's way to the store and back: the checkpoint it resumes from, those it writes, the kernels it compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from job.checkpoints.kernels import CompiledKernels
from job.checkpoints.lease import Commit, Lease
from job.checkpoints.restore import checkpoint_at, restore_newest
from job.checkpoints.syncer import Syncer
from job.run import Run, write_json
from job.supervision.journal import Journal
from job.supervision.stop import StopRequest

_SLICE_SECONDS = 0.25  # a stop request may come during the wait for the last upload


class Checkpointing:
    """Restores a checkpoint before training, and stores checkpoints during it.

    Before anything is stored, `may_store` is called, and storing waits until it returns. `stored` is called afterwards.
    """

    def __init__(
        self,
        run: Run,
        journal: Journal,
        stop: StopRequest,
        may_store: Callable[[], None],
        stored: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._journal, self._stop = run, journal, stop
        self._may_store, self._stored = may_store, stored
        self._kernels = CompiledKernels(run, journal.say)
        self._syncer: Syncer | None = None

    def fetch_kernels(self) -> None:
        """Fetch the kernels that another start of the run compiled."""
        self._kernels.fetch()

    def resume(self, lease: Lease) -> Commit | None:
        """Put the newest intact checkpoint where the trainer looks for it. From then on, store those that are offered.

        Returns its commit, or None if training starts from the beginning. A checkpoint that is on this disk only is stored
        while training resumes from it; other nodes can only have it from the store, so they wait for that.
        """
        restored = restore_newest(self._run, lease.record, self._journal.warn)
        warn = self._journal.warn
        syncer = Syncer(self._run, lease, restored, self._on_commit, self._on_failure, self._may_store, on_slow=warn)
        if restored.step is not None:
            where = " on this disk, which the store does not have" if restored.unstored is not None else ""
            self._journal.say(f"Resuming from the checkpoint of step {restored.step}{where}.", step=restored.step)
        self._syncer = syncer
        if restored.unstored is None:
            self._journal.metrics.lost(lease.former.unsaved_seconds)
            return restored.commit
        assert restored.step is not None
        syncer.offer(restored.step, _copy(restored.unstored))
        if self._run.node.count == 1:
            return None
        while not syncer.drain(_SLICE_SECONDS):
            if syncer.failure is not None or self._stop.requested:
                break
        if syncer.failure is not None:
            raise syncer.failure
        return checkpoint_at(restored.step, lease.record.attempt)

    def offer(self, step: int, folder: Path, save_seconds: float) -> None:
        """Store a checkpoint that is complete on the local disk. Does nothing before `resume` and after `finish`."""
        if self._syncer is not None:
            self._journal.metrics.checkpoint_offered(save_seconds)
            self._syncer.offer(step, folder)

    def finish(self) -> None:
        """Training has ended: wait for the last checkpoint, for as long as a stop request allows.

        Without a stop request, the first failure ends the wait: storing the stage's result comes next and reports its own
        failure. With a stop request, a failure is raised. What was not stored stays on this disk for the next start.
        """
        if self._syncer is None:
            return
        syncer, self._syncer = self._syncer, None
        while not syncer.drain(_SLICE_SECONDS):
            if self._stop.over:
                self._journal.warn("The last checkpoint was not stored in time.")
                break
            if syncer.failure is not None and not self._stop.requested:
                break
        syncer.close()
        if self._stop.requested and syncer.failure is not None:
            raise syncer.failure

    def _on_failure(self, text: str) -> None:
        self._journal.metrics.upload_failed()
        self._journal.warn(text)

    def _on_commit(self, step: int, seconds: float) -> None:
        self._journal.metrics.checkpoint_committed(seconds)
        self._journal.say(f"Checkpoint of step {step} stored in {seconds:.1f} s.", "debug", step=step, committed=True)
        self._stored()
        write_json(self._run.paths.upload_timing_file, {"step": step, "seconds": seconds})
        if not self._stop.requested:
            self._kernels.keep()


def _copy(checkpoint: Path) -> Path:
    """The same files under another name: what is stored is removed, and the trainer reads `checkpoint` at its own time."""
    copy = checkpoint.with_name(f"storing-{checkpoint.name.rpartition('-')[2]}")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in checkpoint.iterdir():
        try:
            os.link(file, copy / file.name)
        except OSError:
            shutil.copy2(file, copy / file.name)
    return copy
