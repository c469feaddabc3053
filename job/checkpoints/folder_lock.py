"""One start of a run at a time in one local folder."""

from __future__ import annotations

import fcntl
import time
import uuid
from pathlib import Path

from job.errors import TransientError


class FolderLock:
    """Keeps two starts out of one local folder. The kernel drops it when its holder dies, so it is never stale.

    `holder` names us; `former` are the holders before us: having the lock proves that they are dead. Raises
    TransientError if another start has the lock. Where the file system has no locks, `former` is empty.
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
                f"Another start of this run is at work in {file.parent}.",
                "Wait for it or stop it; to run a second job here, give it another FT_RUN_ID.",
            ) from None
        except OSError:
            locked = False  # a file system without locks; the lease in the store still holds
        self._stream.seek(0)
        self.former = frozenset(self._stream.read().split()) if locked else frozenset()
        self.holder = uuid.uuid4().hex
        self._stream.write(f"{self.holder}\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _lock_patiently(descriptor: int) -> None:
    """A start that was killed this moment may need another to be gone."""
    for _ in range(20):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
