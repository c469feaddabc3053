"""What it means for the job when a signal kills a training process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from job.training import launcher


@pytest.mark.parametrize(
    ("by_signal", "oom_kills", "others", "code", "said"),
    [
        ({1: signal.SIGKILL}, 0, False, 75, "SIGKILL (ranks: 1)"),
        ({0: signal.SIGABRT, 1: signal.SIGKILL}, 0, False, 75, "SIGKILL (ranks: 1)"),  # NCCL aborts the remaining rank
        ({1: signal.SIGKILL}, 1, False, 69, "memory"),
        ({0: signal.SIGBUS}, 0, False, 69, "/dev/shm"),
        ({0: signal.SIGABRT, 1: signal.SIGABRT}, 0, True, 75, "SIGABRT (ranks: 0, 1)"),
        ({0: signal.SIGABRT}, 0, False, 70, "SIGABRT"),  # there is no other process that could have been lost
        ({0: signal.SIGSEGV}, 0, True, 70, "SIGSEGV"),
    ],
)
def test_a_killed_process_is_retried_one_out_of_memory_is_retried_elsewhere_and_a_crash_is_a_bug(
    monkeypatch: pytest.MonkeyPatch, by_signal: dict[int, int], oom_kills: int, others: bool, code: int, said: str
) -> None:
    monkeypatch.setattr(launcher, "_oom_kills", lambda: oom_kills)
    error = launcher._killed(by_signal, 0, others=others)
    assert error.exit_code == code
    assert said in error.message


def test_processes_that_never_reach_each_other_are_not_retried() -> None:
    assert launcher.unreachable(ConnectionError("timed out\nand more")).exit_code == 69


@pytest.mark.parametrize(
    ("group", "counter"),
    [
        ("0::/job/step", "sys/fs/cgroup/job/step/memory.events"),
        ("4:cpu,memory:/job\n0::/", "sys/fs/cgroup/memory/job/memory.oom_control"),
        ("4:memory:/seen/from/outside", "sys/fs/cgroup/memory/memory.oom_control"),
        ("0::/seen/from/outside", "sys/fs/cgroup/memory.events"),
        (None, "proc/vmstat"),
    ],
)
def test_running_out_of_memory_is_read_from_this_jobs_cgroup_and_not_a_neighbours(
    tmp_path: Path, group: str | None, counter: str
) -> None:
    files = {"proc/vmstat": "oom_kill 7", counter: "low 0\noom_kill 2"}
    if group is not None:
        files["proc/self/cgroup"] = group
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n", encoding="ascii")
    assert launcher._oom_kills(tmp_path) == 2
