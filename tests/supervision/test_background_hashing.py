"""Markers that are made while the next stage is at work."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from job.supervision.background_hashing import Completion, Completions, GoOn
from tests.conftest import ROOT, Job, finished, read_until


def test_all_is_done_in_order_while_the_caller_goes_on() -> None:
    done, may_end = [], threading.Event()

    def completion(name: str) -> Completion:
        return lambda go_on: done.append(name) if may_end.wait(10) else None

    completions = Completions(lambda error: None)
    for name in ("first", "second"):
        completions.add(name, completion(name))
    assert done == []
    may_end.set()
    completions.settle()
    assert done == ["first", "second"] and completions.undone == set()


def test_behind_a_failure_nothing_is_done_and_whoever_waits_is_told_why() -> None:
    tried: list[str] = []
    told: list[Exception] = []

    def fails(go_on: GoOn) -> None:
        tried.append("first")
        raise OSError("the disk is gone")

    def on_failure(error: Exception) -> None:
        told.append(error)
        raise ProcessLookupError

    completions = Completions(on_failure)
    completions.add("first", fails)
    completions.add("second", lambda go_on: tried.append("second"))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            completions.settle()
    completions.abandon()
    assert tried == ["first"]
    assert (completions.failed, completions.undone) == ("first", {"first", "second"})
    assert [str(error) for error in told] == ["the disk is gone"]


def test_a_start_that_is_over_completes_nothing_any_more() -> None:
    began, done = threading.Event(), []

    def endless(go_on: GoOn) -> None:
        began.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            go_on()
        done.append("first")

    told: list[Exception] = []
    completions = Completions(told.append)
    completions.add("first", endless)
    completions.add("second", lambda go_on: done.append("second"))
    assert began.wait(10)
    completions.abandon()
    assert done == []
    assert told == [], "nothing went wrong"
    assert (completions.failed, completions.undone) == (None, {"first", "second"})


@pytest.fixture
def own_sources(job: Job, tmp_path: Path) -> Job:
    """A training on a model and rows that a test may change."""
    shutil.copytree(job.environment["FT_MODEL_NAME"], tmp_path / "model")
    shutil.copyfile(job.environment["FT_DATASET_NAME"], tmp_path / "rows.jsonl")
    job.environment |= {
        "FT_MODEL_NAME": str(tmp_path / "model"), "FT_DATASET_NAME": str(tmp_path / "rows.jsonl"), "FT_STAGES": "train",
    }  # fmt: skip
    return job


def hashing_slowly(folder: Path, body: str) -> dict[str, str]:
    """Settings with which Python runs `body` before each part of a file is hashed: a 7B's take long."""
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(
        "import hashlib, os, time\n"
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
    return hashing_slowly(hold.parent, f"while os.path.exists({str(hold)!r}): time.sleep(0.05)")


def marker(job: Job, stage: str) -> Path:
    return Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / stage / "MANIFEST.json"


def test_the_training_begins_before_its_model_is_hashed_and_a_kill_then_leaves_what_the_next_start_goes_on_from(
    own_sources: Job, tmp_path: Path
) -> None:
    job = own_sources
    process = job.start(**hashing_nothing_while_there_is(tmp_path / "hold"))
    read_until(process, event="progress", stage="train")
    assert not marker(job, "download").exists()
    assert not marker(job, "prepare").exists(), "it was made of what does not count yet"
    process.kill()
    process.communicate()
    result = job.run()
    assert result.code == 0, result.stderr
    assert result.ended == {"preflight": "done", "download": "done", "prepare": "done", "train": "done"}
    assert marker(job, "download").exists() and marker(job, "prepare").exists()


def test_a_stop_while_the_model_is_hashed_does_not_wait_for_the_rest_of_it(own_sources: Job, tmp_path: Path) -> None:
    with (tmp_path / "model" / "LICENSE").open("wb") as stream:
        stream.truncate(80 * 2**18)
    process = own_sources.start(**hashing_slowly(tmp_path, "time.sleep(1)"))
    read_until(process, event="stage_started", stage="prepare")
    began = time.monotonic()
    process.terminate()
    result = finished(process, *process.communicate(timeout=120))
    assert result.code == 75
    assert time.monotonic() - began < 40, "of eighty seconds"
    assert result.ended["download"] == "unfinished"
    assert not marker(own_sources, "download").exists()


def test_sources_that_changed_end_the_training_before_anything_is_stored_of_it(
    own_sources: Job, tmp_path: Path
) -> None:
    job = own_sources
    job.environment["FT_MAX_STEPS"] = "1000000"
    assert job.run(FT_STAGES="download").code == 0
    rows = Path(job.environment["FT_DATASET_NAME"])
    rows.write_bytes(rows.read_bytes().replace(b"Paris", b"Parma"))
    hold = tmp_path / "hold"
    process = job.start(**hashing_nothing_while_there_is(hold))
    read_until(process, event="stage_started", stage="train")
    read_until(process, event="progress", stage="train", done=5)
    hold.unlink()
    result = finished(process, *process.communicate(timeout=60))
    assert result.code == 78
    assert "its sources have changed: dataset/rows.jsonl" in result.error["message"]
    assert result.ended == {"preflight": "done", "download": "failed", "prepare": "unfinished", "train": "failed"}
    checkpoints = Path(job.environment["FT_OUTPUT_DIR"]) / "store" / "test-run" / "checkpoints"
    assert not list(checkpoints.rglob("*"))


def test_a_source_that_changes_while_it_is_hashed_is_told(own_sources: Job, tmp_path: Path) -> None:
    hold, rows = tmp_path / "hold", Path(own_sources.environment["FT_DATASET_NAME"])
    process = own_sources.start(**hashing_nothing_while_there_is(hold))
    read_until(process, event="stage_started", stage="train")
    rows.write_bytes(rows.read_bytes().replace(b"Paris", b"Parma"))
    hold.unlink()
    result = finished(process, *process.communicate(timeout=60))
    assert result.code == 75
    assert "rows.jsonl was changed while it was read" in result.error["message"]
    assert result.ended["download"] == "failed", "it had ended well before"
    assert not marker(own_sources, "download").exists()
