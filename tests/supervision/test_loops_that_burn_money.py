"""A job that gets nowhere ends: it is not started again for ever, and nothing hangs unseen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.lease import Lease
from job.errors import ExitCode, NodeError, NoProgress, Retry, from_os_error
from job.supervision.idle import IdleStarts
from tests.conftest import LIGHTHOUSE, ROOT, Job, finished, free_port, read_until
from tests.supervision.test_interruptions import tree_of

# -- starts that store nothing ---------------------------------------------------------------------------------------


def test_the_sixth_start_in_a_row_that_stores_nothing_new_ends_with_69_and_is_final(job: Job, tmp_path: Path) -> None:
    """Each start ends in training with 75, as behind a store that takes no checkpoint; the disk is another each time."""
    job.environment |= {"FT_STORE_URL": str(tmp_path / "store"), "FT_STOP_GRACE_SECONDS": "4", "FT_MAX_STEPS": "100000",
                        "FT_SAVE_STEPS": "100000"}  # fmt: skip
    for number in range(5):
        process = job.start(FT_OUTPUT_DIR=str(tmp_path / f"machine-{number}"))
        read_until(process, event="stage_started", stage="train")
        process.terminate()
        ended = finished(process, *process.communicate(timeout=60))
        assert (ended.code, ended.error["retry"]) == (75, "anywhere"), ended.stderr
    sixth = job.run(FT_OUTPUT_DIR=str(tmp_path / "machine-6"))
    assert (sixth.code, sixth.error["retry"]) == (69, "no")
    assert "5 starts of this run in a row have stored nothing new" in sixth.error["message"]
    assert "FT_MAX_IDLE_STARTS=0" in sixth.error["hint"]
    assert not any(event.get("event") == "stage_started" for event in sixth.events)


def test_a_start_that_stores_something_sets_the_count_back(make_run: Callable[..., Any]) -> None:
    run = make_run()
    starts = IdleStarts(run)
    for _ in range(4):
        starts.begin()
    starts.stored()
    for _ in range(5):
        starts.begin()
    starts.ended("S3 answers 503 SlowDown")
    with pytest.raises(NoProgress, match=r"5 starts .* S3 answers 503 SlowDown"):
        starts.begin()
    IdleStarts(make_run(MAX_IDLE_STARTS="0")).begin()
    IdleStarts(make_run(MAX_IDLE_STARTS="7")).begin()


def test_the_lease_counts_attempts_that_committed_nothing(make_run: Callable[..., Any], tmp_path: Path) -> None:
    counts = []
    for number in range(5):
        run = make_run(STORE_URL=str(tmp_path / "store"), OUTPUT_DIR=str(tmp_path / f"machine-{number}"))
        lease = Lease.take(run, lambda text: None, lambda: False)
        counts.append(lease.record.idle)
        if number == 2:
            run.store.put(f"{run.id}/checkpoints/step-00000001/attempt-0003/MANIFEST.json", b"{}")
        lease.release("the network failed")
    assert counts == [0, 1, 2, 0, 1]


def test_starts_that_succeed_or_end_with_an_error_of_the_user_are_no_loop(job: Job, tmp_path: Path) -> None:
    """Preflight again and again, and a dataset that fails again and again: each time the answer is the useful one."""
    job.environment |= {"FT_MAX_IDLE_STARTS": "1", "FT_DATASET_SPLIT": "train"}
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": 1}\n{"text": 2}\n', encoding="utf-8")
    for _ in range(3):
        checked = job.run(FT_STAGES="preflight")
        assert checked.code == 0, checked.stderr
        failed = job.run(FT_STAGES="prepare", FT_DATASET_NAME=str(wrong))
        assert failed.code == 65, failed.stderr


def test_starts_that_cannot_reach_their_sources_are_counted_too(job: Job) -> None:
    job.environment |= {
        "FT_MODEL_NAME": "me/model", "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}", "HF_HUB_OFFLINE": "0",
        "FT_MAX_IDLE_STARTS": "1", "HF_HOME": job.environment["FT_OUTPUT_DIR"] + "/hf",
    }  # fmt: skip
    job.forks = False
    first = job.run()
    assert (first.code, first.error["retry"]) == (75, "anywhere"), first.stderr
    second = job.run()
    assert (second.code, second.error["retry"]) == (69, "no")
    assert "The Hub cannot be reached" in second.error["message"]


# -- stages that hang ------------------------------------------------------------------------------------------------


class _Silent(BaseHTTPRequestHandler):
    """A Hub that takes a request and never answers."""

    def do_GET(self) -> None:
        time.sleep(120)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


def test_a_stage_that_waits_for_a_server_that_never_answers_ends_with_69(job: Job) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    job.environment |= {
        "FT_MODEL_NAME": "me/model", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_HUB_ETAG_TIMEOUT": "600", "HF_HUB_DOWNLOAD_TIMEOUT": "600", "FT_STALL_SECONDS": "12",
    }  # fmt: skip
    try:
        began = time.monotonic()
        hung = job.run()
    finally:
        server.shutdown()
        server.server_close()
    assert (hung.code, hung.error["retry"]) == (69, "elsewhere"), hung.stderr
    assert "Stage preflight has made no progress for" in hung.error["message"]
    assert time.monotonic() - began < 90


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prepare", "train"])
def test_a_stage_whose_processes_are_suspended_ends_with_69(job: Job, stage: str) -> None:
    job.forks = False
    # long enough for a busy machine to import the libraries: that takes many seconds, in which nothing is told
    job.environment |= {"FT_STALL_SECONDS": "40", "FT_MAX_STEPS": "100000", "FT_STAGES": "train"}
    process = job.start()
    if stage == "train":
        read_until(process, event="progress", stage="train")
    else:
        read_until(process, event="stage_started", stage=stage)
    for child in tree_of(process.pid)[1:]:
        os.kill(child, signal.SIGSTOP)
    hung = finished(process, *process.communicate(timeout=120))
    assert (hung.code, hung.error["retry"]) == (69, "elsewhere"), hung.stderr
    assert f"Stage {stage} has made no progress" in hung.error["message"]


def test_a_stop_while_a_stage_hangs_is_counted_whatever_the_grace_time(job: Job) -> None:
    """As a liveness probe does it: the probe fails, then the pod is told to stop."""
    from job.report.metrics import Metrics
    from job.supervision.stop import StopRequest

    clock = [0.0]
    metrics = Metrics("a-run", 60, lambda: clock[0])
    metrics.working(True)
    clock[0] = 61.0
    run = type("Run", (), {"settings": type("S", (), {"stop_grace_seconds": 3600})()})()
    stop = StopRequest(run, lambda: None, lambda text: None, stalled=lambda: not metrics.healthy())
    stop._on_signal(signal.SIGTERM, None)
    assert stop.while_stalled
    metrics.moved()
    calm = StopRequest(run, lambda: None, lambda text: None, stalled=lambda: not metrics.healthy())
    calm._on_signal(signal.SIGTERM, None)
    assert not calm.while_stalled


def test_a_job_that_hangs_and_is_told_to_stop_leaves_with_69_before_it_is_killed() -> None:
    """What is left when even killing the stage takes too long: the supervisor's own exit, in a process of its own."""
    code = (
        "import signal, sys, time\n"
        "from job.supervision.stop import StopRequest\n"
        "run = type('Run', (), {'settings': type('S', (), {'stop_grace_seconds': 1})()})()\n"
        "stop = StopRequest(run, lambda: None, print, stalled=lambda: sys.argv[1] == 'stalled')\n"
        "stop._on_signal(signal.SIGTERM, None)\n"
        "time.sleep(30)\n"
    )
    for state, expected in (("stalled", 69), ("working", 75)):
        ended = subprocess.run([sys.executable, "-c", code, state], cwd=ROOT, capture_output=True, timeout=20)
        assert ended.returncode == expected


# -- a worker that dies ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_of_prepare_killed_by_the_kernel_ends_the_job_with_69_and_leaves_no_process(
    job: Job, tmp_path: Path
) -> None:
    rows = LIGHTHOUSE.read_text(encoding="utf-8").splitlines()
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(rows[number % len(rows)] for number in range(12_000)) + "\n", encoding="utf-8")
    job.forks = False
    process = job.start(FT_DATASET_NAME=str(file), FT_DATASET_SPLIT="train", FT_STAGES="prepare")
    read_until(process, event="stage_started", stage="prepare")
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = [pid for pid in tree_of(process.pid)[1:] if _is_worker(pid)]
        time.sleep(0.05)
    everybody = tree_of(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    ended = finished(process, *process.communicate(timeout=120))
    assert (ended.code, ended.error["retry"]) == (69, "anywhere"), ended.stderr
    assert "memory" in ended.error["hint"]
    time.sleep(0.5)
    assert [pid for pid in everybody if Path(f"/proc/{pid}/cmdline").exists() and _is_worker(pid)] == []


def _is_worker(pid: int) -> bool:
    """Whether it is one of the processes that `map` starts: a child of a stage's process that runs Python's spawn."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        parent = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
        return "job.stages" in Path(f"/proc/{parent}/cmdline").read_bytes().decode() and "tracker" not in words
    except (OSError, ValueError):
        return False


# -- whose fault a full disk is --------------------------------------------------------------------------------------


def test_a_full_cache_names_its_own_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("FT_OUTPUT_DIR", str(tmp_path / "results"))
    error = from_os_error(OSError(28, "No space left on device", str(tmp_path / "hf" / "hub" / "blob")))
    assert error is not None and error.exit_code == ExitCode.NODE_UNFIT
    assert f"HF_HOME ({tmp_path / 'hf'})" in error.hint and "FT_OUTPUT_DIR" not in error.hint


def test_a_used_up_quota_is_not_the_nodes_fault_and_a_full_local_disk_is(tmp_path: Path) -> None:
    quota = from_os_error(OSError(122, "Disk quota exceeded", str(tmp_path / "file")))
    full = from_os_error(OSError(28, "No space left on device", str(tmp_path / "file")))
    assert quota is not None and full is not None
    assert (quota.retry, full.retry) == (Retry.ANYWHERE, Retry.ELSEWHERE)
    assert "quota" in quota.message


def test_every_way_to_end_says_whether_another_start_may_help() -> None:
    from job import errors

    expected = {
        errors.SettingsError: "no", errors.InputError: "no", errors.PermissionRefused: "no", errors.JobError: "no",
        errors.NodeError: "elsewhere", errors.NoProgress: "no", errors.TransientError: "anywhere", errors.Stopped: "anywhere",
    }  # fmt: skip
    assert {kind: str(kind("what").retry) for kind in expected} == expected
    child = errors.from_code(69, "killed", "", "anywhere")
    assert isinstance(child, NodeError) and child.retry == "anywhere"
    assert json.dumps({"retry": child.retry}) == '{"retry": "anywhere"}'
