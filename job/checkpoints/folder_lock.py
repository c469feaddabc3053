"""Allows only one start of a run at a time in a local folder."""

from __future__ import annotations

import fcntl
import time
import uuid
from pathlib import Path

from job.errors import TransientError


class FolderLock:
    """A lock that keeps a second start out of a local folder. The kernel releases it when its holder dies.

    `holder` identifies this start, and `boot` the kernel it runs on. Since we have the lock, the previous holders on this
    kernel are dead. Of those on another machine it says nothing: its lock may not have reached this one. Raises
    TransientError if another start has the lock.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a+", encoding="ascii")
        try:
            _lock_patiently(self._stream.fileno())
            locked = True
        except BlockingIOError:
            self._stream.close()
            raise TransientError(
                f"Another start of this run is working in {file.parent}.",
                "Wait for it or stop it. To run a second job here, set another FT_RUN_ID.",
            ) from None
        except OSError:
            locked = False  # this file system has no locks, but the lease in the store still protects the run
        self._stream.seek(0)
        self._former = frozenset(self._stream.read().split()) if locked else frozenset()
        self.holder = uuid.uuid4().hex
        self.boot = _boot()
        self._stream.write(f"{self.holder}\n")
        self._stream.flush()

    def has_died(self, holder: str, boot: str) -> bool:
        """Whether a start that had this lock, on the kernel `boot`, is certainly over."""
        return bool(boot) and boot == self.boot and holder in self._former

    def close(self) -> None:
        self._stream.close()


def _boot() -> str:
    """The id of this boot of this machine's kernel (random(4)), the same in all its containers; empty elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _lock_patiently(descriptor: int) -> None:
    """Retry for 2 seconds: a start that was just killed may take a moment to die."""
    for _ in range(20):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
