"""Uploading checkpoints while the training goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.lease import Lease, Superseded
from job.checkpoints.manifest import commit
from job.checkpoints.restore import Restored, checkpoint_at
from job.checkpoints.retention import apply_retention
from job.errors import JobError, TransientError, from_os_error
from job.run import Run

_PAUSES_SECONDS = (0.5, 2, 8, 30)  # then every 30 s, until it works or a newer checkpoint takes its place
_NICENESS = 10  # hashing gives way to the training where cores are few


@dataclass(frozen=True)
class _Checkpoint:
    step: int
    folder: Path


def give_way() -> None:
    """Let this thread, and those that it starts, run behind the training."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


class Syncer:
    """Commits the newest local checkpoint to the store, in a thread of the supervisor.

    The trainer never waits for it. While an upload runs, a newer checkpoint takes the place of the one that waits, so
    at most three lie on the local disk: one under way, one waiting, one being written. What fails is tried again until
    a newer checkpoint waits; `failure` is the reason why the newest offered is not in the store, if it is not.
    `on_commit(step, seconds)` and `on_failure(message)` are called from the thread, and so is `may_store`, which returns when
    something may be stored, or raises.
    """

    def __init__(
        self,
        run: Run,
        lease: Lease,
        restored: Restored,
        on_commit: Callable[[int, float], None],
        on_failure: Callable[[str], None],
        may_store: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._lease, self._restored = run, lease, restored
        self._on_commit, self._on_failure, self._may_store = on_commit, on_failure, may_store
        self._waiting: _Checkpoint | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="syncer", daemon=True)
        self._thread.start()
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
        give_way()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None or self._closed:
                    return
                checkpoint, self._waiting, self._busy = self._waiting, None, True
                self.failure = None
            try:
                self._commit_patiently(checkpoint)
            except Exception as error:  # a dead thread would leave everybody waiting
                self.failure = TransientError(f"{type(error).__name__}: {error}", "Start the job again.")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _commit_patiently(self, checkpoint: _Checkpoint) -> None:
        started, tries = time.monotonic(), 0
        while True:
            failure = self._try(checkpoint)
            with self._changed:
                self.failure = failure
                self._changed.notify_all()
            if failure is None:
                seconds = time.monotonic() - started
                self._tidy(checkpoint)
                _tell(self._on_commit, checkpoint.step, seconds)
                return
            tries += 1
            what = f"Checkpoint of step {checkpoint.step} is not stored (try {tries}): {failure.message}"
            _tell(self._on_failure, what)
            pause = _PAUSES_SECONDS[min(tries, len(_PAUSES_SECONDS)) - 1]
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._closed, pause):
                    break
            if isinstance(failure, Superseded):
                break
        shutil.rmtree(checkpoint.folder, ignore_errors=True)

    def _try(self, checkpoint: _Checkpoint) -> JobError | None:
        place = checkpoint_at(checkpoint.step, self._lease.record.attempt)
        fingerprint = self._run.settings.fingerprint("train")
        try:
            self._may_store()
            commit(self._run.store, f"{self._run.id}/{place.folder}", checkpoint.folder, fingerprint, self._lease.renew)
        except JobError as error:
            return error
        except Exception as error:
            return from_os_error(error) or TransientError(f"{type(error).__name__}: {error}", "Start the job again.")
        return None

    def _tidy(self, checkpoint: _Checkpoint) -> None:
        """The store has it: the local copy and the store's oldest can go. A failure here costs space, not work."""
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
        try:
            apply_retention(self._run, self._lease, self._restored.rejected)
        except (JobError, OSError) as error:
            _tell(self._on_failure, f"Old checkpoints stay in the store for now: {error}")


def _tell(callback: Callable[..., None], *arguments: object) -> None:
    """A full disk or a closed terminal, where the callback writes, is no reason to stop storing checkpoints."""
    with contextlib.suppress(OSError):
        callback(*arguments)
