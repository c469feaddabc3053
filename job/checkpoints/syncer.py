"""Uploads checkpoints while training goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.lease import Lease, Superseded
from job.checkpoints.manifest import Manifest, commit, mark
from job.checkpoints.restore import Restored, checkpoint_at
from job.checkpoints.retention import apply_retention
from job.errors import JobError, TransientError, from_os_error
from job.run import Run

_PAUSES_SECONDS = (0.5, 2, 8, 30)  # between tries, then 30 s, until it works or a newer checkpoint replaces this one
_SLOW_SECONDS = 25.0  # before a user hears that a checkpoint is still not stored
_NICENESS = 10  # so that hashing does not slow down training on few cores


@dataclass(frozen=True)
class _Checkpoint:
    step: int
    folder: Path
    manifest: Manifest


def give_way() -> None:
    """Lower the priority of this thread, and of those it starts, below that of training."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)


class Syncer:
    """Two supervisor threads: one marks each local checkpoint as whole and durable, one commits the newest to the store.

    The trainer never waits for them. While an upload runs, a newer checkpoint replaces the waiting one once it is marked.
    So the local disk holds at most four: one uploading, one waiting, one being marked, one being written. A failed upload
    is retried until a newer checkpoint is waiting. What is not in the store when the job ends stays on the disk, where the
    next start finds it. `failure` says why the newest checkpoint offered is not in the store, or is None.
    The threads call `on_commit(step, seconds)`, `on_failure(message)`, `on_slow(message)` while a try takes long, and
    `may_store`. The last returns once storing is allowed, or raises.
    """

    def __init__(
        self,
        run: Run,
        lease: Lease,
        restored: Restored,
        on_commit: Callable[[int, float], None],
        on_failure: Callable[[str], None],
        may_store: Callable[[], None] = lambda: None,
        on_slow: Callable[[str], None] = lambda message: None,
    ) -> None:
        self._run, self._lease, self._restored, self._on_slow = run, lease, restored, on_slow
        self._on_commit, self._on_failure, self._may_store = on_commit, on_failure, may_store
        self._waiting: _Checkpoint | None = None
        self._busy = False
        self._marking = 0
        self._closed = False
        self._changed = threading.Condition()
        self._marker = ThreadPoolExecutor(1, "marker", give_way)
        self._thread = threading.Thread(target=self._work, name="syncer", daemon=True)
        self._thread.start()
        self.failure: JobError | None = None

    def offer(self, step: int, folder: Path) -> None:
        """Hand over a checkpoint that is complete on the local disk."""
        with self._changed:
            self._marking += 1
        self._marker.submit(self._mark, step, folder)

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being marked, waiting or uploading. Returns False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._waiting is None and not self._busy and not self._marking, timeout_seconds
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._marker.shutdown(wait=False)
        self._thread.join(timeout=1)

    def _mark(self, step: int, folder: Path) -> None:
        """Hash a checkpoint and make it durable, so that it counts on this disk whatever becomes of the store."""
        skipped = None
        try:
            manifest = Manifest.of(folder, self._run.fingerprint("train"))
            mark(folder, manifest)
        except Exception as error:
            known = error if isinstance(error, JobError) else from_os_error(error)
            self.failure = known or TransientError(f"{type(error).__name__}: {error}", "Start the job again.")
            _tell(self._on_failure, f"Checkpoint of step {step} was not stored: {self.failure.message}")
        else:
            with self._changed:
                skipped, self._waiting = self._waiting, _Checkpoint(step, folder, manifest)
        finally:
            with self._changed:
                self._marking -= 1
                self._changed.notify_all()
        if skipped is not None:
            shutil.rmtree(skipped.folder, ignore_errors=True)

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
            except Exception as error:  # if this thread died, everybody would wait forever
                self.failure = TransientError(f"{type(error).__name__}: {error}", "Start the job again.")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _commit_patiently(self, checkpoint: _Checkpoint) -> None:
        started, tries = time.monotonic(), 0
        while True:
            with self._told_when_slow(checkpoint):
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
            what = f"Checkpoint of step {checkpoint.step} was not stored (try {tries}): {failure.message}"
            _tell(self._on_failure, what)
            pause = _PAUSES_SECONDS[min(tries, len(_PAUSES_SECONDS)) - 1]
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._closed, pause):
                    replaced = self._waiting is not None
                    break
            if isinstance(failure, Superseded):
                return
        if replaced:
            shutil.rmtree(checkpoint.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _told_when_slow(self, checkpoint: _Checkpoint) -> Iterator[None]:
        """A store that fails is retried for minutes. Say within half a minute that a checkpoint is not stored yet."""
        began = time.monotonic()

        def tell() -> None:
            trouble = self._run.store.trouble(began)
            why = f": {trouble}. Retrying" if trouble else ""
            what = f"Checkpoint of step {checkpoint.step} is not stored yet, after {_SLOW_SECONDS:.0f} s{why}."
            _tell(self._on_slow, what)

        timer = threading.Timer(_SLOW_SECONDS, tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _try(self, checkpoint: _Checkpoint) -> JobError | None:
        place = checkpoint_at(checkpoint.step, self._lease.record.attempt)
        try:
            self._may_store()
            commit(
                self._run.store, f"{self._run.id}/{place.folder}", checkpoint.folder, checkpoint.manifest.fingerprint,
                self._lease.renew, hashed=checkpoint.manifest,
            )  # fmt: skip
        except JobError as error:
            return error
        except Exception as error:
            return from_os_error(error) or TransientError(f"{type(error).__name__}: {error}", "Start the job again.")
        return None

    def _tidy(self, checkpoint: _Checkpoint) -> None:
        """Delete the local copy and the oldest checkpoints in the store. A failure here costs space, not work."""
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
        try:
            apply_retention(self._run, self._lease, self._restored.rejected)
        except (JobError, OSError) as error:
            _tell(self._on_failure, f"Could not delete old checkpoints from the store yet: {error}")


def _tell(callback: Callable[..., None], *arguments: object) -> None:
    """Call back, ignoring OSError: a full disk or a closed terminal must not stop checkpoint uploads."""
    with contextlib.suppress(OSError):
        callback(*arguments)
