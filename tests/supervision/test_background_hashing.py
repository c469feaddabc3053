"""Markers that are written while the next stage runs."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from job.supervision.background_hashing import BackgroundHashing, Completion, GoOn
from tests.conftest import ROOT, Job, finished, read_until


def test_all_work_is_done_in_order_while_the_caller_continues() -> None:
    done, may_end = [], threading.Event()

    def completion(name: str) -> Completion:
        return lambda go_on: done.append(name) if may_end.wait(10) else None

    hashing = BackgroundHashing(lambda error: None)
    for name in ("first", "second"):
        hashing.add(name, completion(name))
    assert done == []
    may_end.set()
    hashing.settle()
    assert done == ["first", "second"] and hashing.undone == set()


def test_after_a_failure_nothing_more_is_done_and_the_waiting_caller_is_told_why() -> None:
    tried: list[str] = []
    told: list[Exception] = []

    def fails(go_on: GoOn) -> None:
        tried.append("first")
        raise OSError("the disk is gone")

    def on_failure(error: Exception) -> None:
        told.append(error)
        raise ProcessLookupError

    hashing = BackgroundHashing(on_failure)
    hashing.add("first", fails)
    hashing.add("second", lambda go_on: tried.append("second"))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            hashing.settle()
    hashing.abandon()
    assert tried == ["first"]
    assert (hashing.failed, hashing.undone) == ("first", {"first", "second"})
    assert [str(error) for error in told] == ["the disk is gone"]


def test_an_abandoned_start_completes_nothing_more() -> None:
    began, done = threading.Event(), []

    def endless(go_on: GoOn) -> None:
        began.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            go_on()
        done.append("first")

    told: list[Exception] = []
    hashing = BackgroundHashing(told.append)
    hashing.add("first", endless)
    hashing.add("second", lambda go_on: done.append("second"))
    assert began.wait(10)
    hashing.abandon()
    assert done == []
    assert told == [], "nothing went wrong"
    assert (hashing.failed, hashing.undone) == (None, {"first", "second"})


@pytest.fixture
def own_sources(job: Job, tmp_path: Path) -> Job:
    """A training on a copy of the model and rows that a test may change."""
    shutil.copytree(job.environment["FT_MODEL_NAME"], tmp_path / "model")
    shutil.copyfile(job.environment["FT_DATASET_NAME"], tmp_path / "rows.jsonl")
    job.environment |= {
        "FT_MODEL_NAME": str(tmp_path / "model"), "FT_DATASET_NAME": str(tmp_path / "rows.jsonl"), "FT_STAGES": "train",
    }  # fmt: skip
    return job


def hashing_slowly(folder: Path, body: str) -> dict[str, str]:
    """Settings that run `body` before each part of a file is hashed. Hashing a 7B takes long."""
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(
        "import hashlib, os, sys, time\n"
        "def restoring():\n"
        "    frame = sys._getframe()\n"
        "    while frame is not None and frame.f_code.co_name != 'restore':\n"
        "        frame = frame.f_back\n"
        "    return frame is not None\n"
        "real = hashlib.sha256\n"
        "class Slow:\n"
        "    def __init__(self, *data, **named):\n"
        "        self.inner = real(*data, **named)\n"
        "    def update(self, data):\n"
        f"        {body}\n"
        "        self.inner.update(data)\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.inner, name)\n"
        "hashlib.sha256 = Slow\n",
        encoding="utf-8",
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder / "slow"), str(ROOT)])}


def hashing_nothing_while_there_is(hold: Path) -> dict[str, str]:
    hold.touch()
    return hashing_slowly(hold.parent, f"while os.path.exists({str(hold)!r}) and not restoring(): time.sleep(0.05)")


def marker(job: Job, stage: str) -> Path:
    return Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / stage / "MANIFEST.json"


def test_training_starts_before_its_model_is_hashed_and_the_next_start_can_resume_after_a_kill_then(
    own_sources: Job, tmp_path: Path
) -> None:
    job = own_sources
    process = job.start(**hashing_nothing_while_there_is(tmp_path / "hold"))
    read_until(process, event="progress", stage="train")
    assert not marker(job, "download").exists()
    assert not marker(job, "prepare").exists(), "it was written for a result that does not count yet"
    process.kill()
    process.communicate()
    result = job.run()
    assert result.code == 0, result.stderr
    assert result.ended == {"preflight": "done", "download": "done", "prepare": "done", "train": "done"}
    assert marker(job, "download").exists() and marker(job, "prepare").exists()


def test_a_stop_while_the_model_is_hashed_does_not_wait_for_the_rest(own_sources: Job, tmp_path: Path) -> None:
    with (tmp_path / "model" / "LICENSE").open("wb") as stream:
        stream.truncate(80 * 2**18)
    process = own_sources.start(**hashing_slowly(tmp_path, "time.sleep(1)"))
    read_until(process, event="stage_started", stage="prepare")
    began = time.monotonic()
    process.terminate()
    result = finished(process, *process.communicate(timeout=120))
    assert result.code == 75
    assert time.monotonic() - began < 40, "it waited for the whole eighty seconds"
    assert result.ended["download"] == "unfinished"
    assert not marker(own_sources, "download").exists()


def test_changed_sources_end_the_training_before_anything_of_it_is_stored(own_sources: Job, tmp_path: Path) -> None:
    job = own_sources
    job.environment |= {"FT_MAX_STEPS": "1000000", "FT_LOG_LEVEL": "debug"}
    process = job.start()
    read_until(process, committed=True)
    process.terminate()
    assert finished(process, *process.communicate(timeout=60)).code == 75
    checkpoints = Path(job.environment["FT_OUTPUT_DIR"]) / "store" / "test-run" / "checkpoints"
    before = {path.relative_to(checkpoints) for path in checkpoints.rglob("MANIFEST.json")}
    rows = Path(job.environment["FT_DATASET_NAME"])
    rows.write_bytes(rows.read_bytes().replace(b"Paris", b"Parma"))
    hold = tmp_path / "hold"
    process = job.start(**hashing_nothing_while_there_is(hold))
    read_until(process, event="stage_started", stage="train")
    read_until(process, event="progress", stage="train")
    hold.unlink()
    result = finished(process, *process.communicate(timeout=60))
    assert result.code == 78
    assert "its sources have changed: dataset/rows.jsonl" in result.error["message"]
    assert result.ended == {"preflight": "done", "download": "failed", "prepare": "unfinished", "train": "failed"}
    assert before == {path.relative_to(checkpoints) for path in checkpoints.rglob("MANIFEST.json")}


def test_a_source_that_changes_while_it_is_hashed_is_reported(own_sources: Job, tmp_path: Path) -> None:
    hold, rows = tmp_path / "hold", Path(own_sources.environment["FT_DATASET_NAME"])
    process = own_sources.start(**hashing_nothing_while_there_is(hold))
    read_until(process, event="stage_started", stage="train")
    rows.write_bytes(rows.read_bytes().replace(b"Paris", b"Parma"))
    hold.unlink()
    result = finished(process, *process.communicate(timeout=60))
    assert result.code == 75
    assert "rows.jsonl changed while it was being read" in result.error["message"]
    assert result.ended["download"] == "failed", "it had finished well before"
    assert not marker(own_sources, "download").exists()
