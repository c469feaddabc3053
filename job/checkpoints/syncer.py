"""Uploading checkpoints while the training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.manifest import commit
from job.checkpoints.restore import prefix_of
from job.checkpoints.retention import apply_retention
from job.errors import JobError
from job.run import Run

_TRIES = 4


@dataclass(frozen=True)
class _Checkpoint:
    step: int
    folder: Path


class Syncer:
    """Commits the newest local checkpoint to the store, in a thread of the supervisor.

    The trainer never waits for it. While an upload runs, a newer checkpoint takes the place of the one that waits.
    `on_commit(step, seconds)` and `on_failure(message)` are called from the thread.
    """

    def __init__(self, run: Run, on_commit: Callable[[int, float], None], on_failure: Callable[[str], None]) -> None:
        self._run, self._on_commit, self._on_failure = run, on_commit, on_failure
        self._waiting: _Checkpoint | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="syncer", daemon=True)
        self._thread.start()
        self.committed_step: int | None = None
        self.failure: JobError | None = None

    def offer(self, step: int, folder: Path) -> None:
        """A checkpoint is complete on the local disk."""
        with self._changed:
            skipped, self._waiting = self._waiting, _Checkpoint(step, folder)
            self._changed.notify_all()
        if skipped is not None:
            shutil.rmtree(skipped.folder, ignore_errors=True)

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing waits or is under way; False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._busy, timeout_seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                checkpoint, self._waiting, self._busy = self._waiting, None, True
            try:
                self._commit(checkpoint)
            except Exception as error:  # a dead thread would leave everybody waiting
                self.failure = JobError(f"{type(error).__name__}: {error}")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _commit(self, checkpoint: _Checkpoint) -> None:
        started = time.monotonic()
        fingerprint = self._run.settings.fingerprint("train")
        for attempt in range(1, _TRIES + 1):
            try:
                commit(self._run.store, prefix_of(self._run.id, checkpoint.step), checkpoint.folder, fingerprint)
            except (JobError, OSError) as error:
                self.failure = error if isinstance(error, JobError) else JobError(str(error))
                self._on_failure(
                    f"Checkpoint of step {checkpoint.step} not stored (try {attempt} of {_TRIES}): {error}"
                )
                time.sleep(min(2**attempt, 30) / 4)
            else:
                self.committed_step, self.failure = checkpoint.step, None
                self._on_commit(checkpoint.step, time.monotonic() - started)
                self._tidy(checkpoint)
                return

    def _tidy(self, checkpoint: _Checkpoint) -> None:
        """The store has it: the local copy and the store's oldest can go. A failure here costs space, not work."""
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
        try:
            apply_retention(self._run, checkpoint.step)
        except (JobError, OSError) as error:
            self._on_failure(f"Old checkpoints stay in the store for now: {error}")
