"""Notices that the kernel has killed a process that the stage started. Libraries may wait for such a one for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_LOOK_SECONDS = 0.5
_BY_THE_KERNEL = (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV)


class ChildKilled(RuntimeError):
    """A child process was killed, so what it was to do is never done."""


@contextlib.contextmanager
def no_child_killed(stage: str) -> Iterator[None]:
    """End the process of `stage` as `ChildKilled` would if a child of it is killed within this block, whatever the block waits for.

    The first look leaves the dead child to whoever started it (waitid(2), WNOWAIT), and a second one makes sure that
    nobody has dealt with it: `datasets` replaces none, but says so itself.
    """
    over = threading.Event()
    threading.Thread(target=_watch, args=(stage, over), name="children", daemon=True).start()
    try:
        yield
    except Exception as error:
        if _tells_of_death(error):
            raise ChildKilled("A worker abruptly died.") from error
        raise
    finally:
        over.set()


def _tells_of_death(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, is about a pipe to or from a process that is gone, or a wait for it in vain."""
    while error is not None:
        if isinstance(error, BrokenPipeError | EOFError | ConnectionError) or "abruptly died" in str(error):
            return True
        if type(error).__name__ == "TimeoutError" and type(error).__module__.startswith("multiprocess"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _watch(stage: str, over: threading.Event) -> None:
    seen: int | None = None
    while not over.wait(_LOOK_SECONDS):
        with contextlib.suppress(ChildProcessError):
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            killed = dead is not None and dead.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
            if dead is None or not killed or dead.si_status not in _BY_THE_KERNEL:
                seen = None
                continue
            if dead.si_pid != seen:
                seen = dead.si_pid
                continue
            from job.stages.__main__ import end_as  # which imports the stage, which imports this

            end_as(stage, ChildKilled(f"Process {dead.si_pid} abruptly died by {signal.Signals(dead.si_status).name}."))
