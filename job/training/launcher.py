"""One training process per GPU: starts them, watches them, and explains why one exited."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from job.cluster import Node
from job.errors import ExitCode, JobError, NodeError, TransientError
from job.report.events import EVENTS_FD
from job.training.ranks import environment_of

_SHUTDOWN_SECONDS = 5.0  # for the others to report that they lost contact, before they are killed
_POLL_SECONDS = 0.1


def launch(node: Node, stage: str, processes: int, meeting_file: Path) -> int:
    """Run `python -m job.stages STAGE` in `processes` processes on this node. Returns 0 or the exit code of one of them.

    Raises NodeError or TransientError if a signal killed one. The others cannot continue without it and are killed too.
    """
    # Without this every process would use all cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    told = os.environ.get("JOB_RDZV_PROCESSES")
    everywhere = tuple(map(int, told.split(","))) if told else (processes,)
    meeting_file.unlink(missing_ok=True)  # an earlier start's
    endpoint = os.environ.get("JOB_RDZV_ENDPOINT")
    before = _oom_kills()
    ranks = [
        _start(stage, environment_of(local, everywhere, node.index if told else 0, endpoint, meeting_file))
        for local in range(processes)
    ]
    try:
        codes = _wait(ranks)
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                rank.kill()
            rank.wait()
        meeting_file.unlink(missing_ok=True)
    first = sum(everywhere[: node.index]) if told else 0
    by_signal = {first + local: -code for local, code in enumerate(codes) if code < 0}
    in_words = {code for code in codes if code > 0}
    if by_signal and in_words <= {ExitCode.TRY_AGAIN}:  # the others lost contact with it
        raise _killed(by_signal, before, others=node.count > 1)
    return max(in_words, default=int(ExitCode.OK))


def _start(stage: str, told: dict[str, str]) -> subprocess.Popen[bytes]:
    """One rank, in this process's group, so that whoever kills that kills the ranks too."""
    passed = [int(os.environ[EVENTS_FD])] if EVENTS_FD in os.environ else []
    return subprocess.Popen(
        [sys.executable, "-m", "job.stages", stage],
        env={**os.environ, "JOB_PARENT_PID": str(os.getpid()), **told},
        pass_fds=passed,
        stdin=subprocess.DEVNULL,
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit status of each. Once one has failed, the others have a moment to say what they saw of it.

    A rank that was killed only because another had failed counts as stopped, not as killed.
    """
    deadline: float | None = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.returncode for rank in ranks):
            deadline = time.monotonic() + _SHUTDOWN_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            late = [rank for rank in ranks if rank.poll() is None]
            for rank in late:
                rank.kill()
                rank.wait()
            return [int(ExitCode.TRY_AGAIN) if rank in late else rank.returncode for rank in ranks]
        time.sleep(_POLL_SECONDS)
    return [rank.returncode for rank in ranks]


def unreachable(error: Exception) -> NodeError:
    """The error for processes that cannot connect.

    It is a NodeError, since a retry here would fail the same way at the same cost. So attempts are counted, or moved to
    other machines.
    """
    return NodeError(
        f"The training processes cannot reach each other: {str(error).splitlines()[0]}",
        "Check /dev/shm, the network between the nodes, FT_MASTER_ADDR, FT_MASTER_PORT and NCCL_SOCKET_IFNAME. NCCL_DEBUG=INFO logs more.",
    )


def _killed(by_signal: dict[int, int], oom_kills_before: int, *, others: bool) -> JobError:
    # NCCL aborts the other processes when one is gone, so another signal than SIGABRT is the cause.
    number = min(by_signal.values(), key=lambda number: number == signal.SIGABRT)
    ranks = ", ".join(str(rank) for rank, ended_by in sorted(by_signal.items()) if ended_by == number)
    what = f"Training processes were killed by {signal.Signals(number).name} (ranks: {ranks})."
    if _oom_kills() > oom_kills_before:
        return NodeError(f"{what} The machine or the container ran out of memory.", "Give the job more memory.")
    if number == signal.SIGBUS:
        return NodeError(
            f"{what} /dev/shm is full, or the machine's memory is broken.", "Give the job a larger /dev/shm."
        )
    if number in (signal.SIGKILL, signal.SIGTERM):
        return TransientError(what, "Start the job again. It continues from the last checkpoint.")
    if number == signal.SIGABRT and others:
        return TransientError(f"{what} NCCL does this when a process on another node is gone.", "Start the job again.")
    return JobError(what, "A library crashed. Its last output is in the stage's log file.")


def _oom_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed because memory ran out.

    They are counted in this process's control group, else in this container, else on the whole machine, where they may
    be another user's.
    """
    for file in _oom_counters(root):
        try:
            counts = dict(line.split() for line in file.read_text(encoding="ascii").splitlines())
        except OSError:
            continue
        if "oom_kill" in counts:
            return int(counts["oom_kill"])
    return 0


def _oom_counters(root: Path) -> Iterator[Path]:
    """Files with OOM counters of cgroups v2 and v1 (cgroups(7)), from the narrowest scope to the whole machine."""
    groups = root / "sys/fs/cgroup"
    own = root / "proc/self/cgroup"
    for line in own.read_text(encoding="utf-8").splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield groups / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield groups / "memory" / path.lstrip("/") / "memory.oom_control"
    yield groups / "memory.events"
    yield groups / "memory" / "memory.oom_control"
    yield root / "proc/vmstat"
