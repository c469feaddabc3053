"""One training process per GPU, started and watched by torchrun's agent (torch.distributed.elastic)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from job.cluster import Node
from job.errors import ExitCode, JobError, NodeError, TransientError

_SHUTDOWN_SECONDS = 5  # the agent sends SIGTERM first, which our processes ignore
_MEET_SECONDS = 900  # every node has reported that it is ready, but may still be downloading the checkpoint


def launch(node: Node, run_id: str, stage: str, processes: int) -> int:
    """Run `python -m job.stages STAGE` in `processes` processes on this node.

    Returns 0, or the exit code of one that failed. Raises NodeError, TransientError or JobError if a signal killed one.
    The others cannot continue alone and are stopped.
    """
    endpoint = os.environ.get("JOB_RDZV_ENDPOINT")
    # Without this every process would use all cores. torchrun's own default, one thread, leaves most of them idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_SECONDS))
    os.environ["JOB_PARENT_PID"] = str(os.getpid())  # for the processes started below
    config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=processes,
        run_id=os.environ.get("JOB_RDZV_ID", run_id),
        rdzv_backend="static" if endpoint else "c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        rdzv_configs={"rank": node.index, "timeout": _MEET_SECONDS} if endpoint else {},
        max_restarts=0,  # the scheduler starts the job again, from a verified checkpoint
        monitor_interval=0.1,
        signals_to_handle="SIGHUP",  # on SIGTERM the agent would kill its processes after 30 s (pytorch#119856)
    )
    before = _oom_kills()
    try:
        elastic_launch(config, sys.executable)("-m", "job.stages", stage)
    except (DistNetworkError, DistStoreError, RendezvousError) as error:
        raise unreachable(error) from error
    except ChildFailedError as error:
        by_signal = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
        in_words = {failure.exitcode for failure in error.failures.values()} - {
            -number for number in by_signal.values()
        }
        if by_signal and in_words <= {ExitCode.TRY_AGAIN}:  # the others only lost contact with it
            raise _killed(by_signal, before, others=node.count > 1) from None
        return max(in_words)
    return ExitCode.OK


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
