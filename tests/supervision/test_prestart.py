"""Stage processes that are started before their turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.run import Run
from job.stages import turn
from tests.conftest import ROOT, Job, finished, is_running, read_until


def stages_running(pid: int) -> dict[str, int]:
    """The process of each stage that has one below `pid`."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        arguments = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if "job.stages" in arguments:
            found[arguments[-2]] = int(child)
    return found


def test_a_process_started_early_waits_for_its_turn_and_counts_its_time_from_then(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    turn.give(run, "train")  # by an earlier start
    turn.clear(run)
    monkeypatch.setenv(turn.STARTED_EARLY, "1")
    monkeypatch.setenv("JOB_STAGE_BEGAN", "0")
    waiting = threading.Thread(target=turn.await_turn, args=(run, "prepare", "train"), daemon=True)
    waiting.start()
    for stage in ("preflight", "download"):
        turn.give(run, stage)
        waiting.join(0.2)
        assert waiting.is_alive(), f"it took {stage}'s turn for its own"
    before = time.time()
    turn.give(run, "prepare")
    waiting.join(5)
    assert not waiting.is_alive()
    assert before <= float(os.environ["JOB_STAGE_BEGAN"]) <= time.time()


def test_a_process_started_at_its_turn_does_not_wait(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    monkeypatch.setenv("JOB_STAGE_BEGAN", "5")
    turn.await_turn(run, "train")
    assert os.environ["JOB_STAGE_BEGAN"] == "5"


def test_a_process_whose_parent_dies_does_not_wait_for_another_starts_turn(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, parents = make_run(), iter([7, 7, 1])
    monkeypatch.setenv(turn.STARTED_EARLY, "1")
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(SystemExit) as ended:
        turn.await_turn(run, "train")
    assert ended.value.code == 75


@pytest.mark.parametrize("rank", [{}, {"RANK": "0"}])
def test_a_process_whose_parent_died_before_it_started_exits_immediately(rank: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "JOB_PARENT_PID": "1", "FT_OUTPUT_DIR": str(tmp_path), "FT_DEVICE": "cpu", **rank}
    done = subprocess.run([sys.executable, "-m", "job.stages", "train"], cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 75


def test_later_stages_run_in_prestarted_processes_and_one_that_died_waiting_is_started_again(
    job: Job,
) -> None:
    process = job.start(FT_STAGES="train", FT_MAX_STEPS="2")
    read_until(process, event="stage_started", stage="download")
    early = stages_running(process.pid)
    assert set(early) == {"download", "prepare", "train"}
    os.kill(early["prepare"], signal.SIGKILL)
    warnings = []
    assert process.stdout is not None
    for event in map(json.loads, process.stdout):
        warnings += [event["message"]] if event["level"] == "warning" and "process" in event["message"] else []
        if (event.get("event"), event.get("stage")) == ("progress", "train"):
            break
    assert warnings == ["The process waiting for stage prepare exited with -9 before its turn. Starting another."]
    assert stages_running(process.pid) == {"train": early["train"]}
    result = finished(process, *process.communicate(timeout=120))
    assert result.code == 0, result.stderr
    run_dir = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"
    goodput: dict[str, Any] = json.loads((run_dir / "train" / "metrics.json").read_text(encoding="utf-8"))["goodput"]
    stages = next(event for event in result.events if event.get("event") == "run_ended")["stages"]
    seconds = {stage["stage"]: stage["seconds"] for stage in stages}
    before_training = sum(seconds[name] for name in ("preflight", "download", "prepare"))
    own = goodput["seconds"]["start"] + goodput["seconds"]["first_step"]
    # its own time starts at its turn, not while it waits
    assert goodput["first_step_after_seconds"] == pytest.approx(before_training + own, abs=1.5)
    first_step = next(text for text in stages[-1]["outputs"] if text.startswith("first step: "))
    assert first_step.endswith("after the job started")


def test_a_start_that_fails_leaves_no_waiting_process_behind(job: Job) -> None:
    process = job.start(FT_DEVICE="cuda", FT_STAGES="train")
    read_until(process, event="stage_started", stage="preflight")
    early: dict[str, int] = {}
    while len(early) < 4 and process.poll() is None:
        early |= stages_running(process.pid)
    assert set(early) == {"preflight", "download", "prepare", "train"}
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 5
    while any(map(is_running, early.values())):
        assert time.monotonic() < deadline, "a process outlived its job"
        time.sleep(0.05)
