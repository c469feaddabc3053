"""Checkpoints reach the store while training goes on; old ones go, a damaged one is passed over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.manifest import commit
from job.checkpoints.restore import committed_steps, prefix_of, restore_newest
from job.checkpoints.syncer import Syncer
from job.errors import TransientError


@pytest.fixture
def run(make_run: Callable[..., Any]) -> Any:
    return make_run()


def checkpoint(run: Any, step: int) -> Path:
    folder: Path = run.paths.checkpoints_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(str(step), encoding="utf-8")
    return folder


def commit_steps(run: Any, *steps: int) -> None:
    for step in steps:
        commit(run.store, prefix_of(run.id, step), checkpoint(run, step), run.settings.fingerprint("train"))


def test_an_offered_checkpoint_is_committed_and_the_local_copy_removed(run: Any) -> None:
    committed: list[int] = []
    syncer = Syncer(run, lambda step, seconds: committed.append(step), lambda text: None)
    folder = checkpoint(run, 2)
    syncer.offer(2, folder)
    assert syncer.drain(30)
    syncer.close()
    assert committed == [2] == committed_steps(run)
    assert not folder.exists()


def test_while_an_upload_runs_only_the_newest_waits(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    may_upload, started = threading.Event(), threading.Event()
    upload = type(run.store).upload

    def slow(self: Any, source: Path, key: str) -> None:
        started.set()
        assert may_upload.wait(30)
        upload(self, source, key)

    monkeypatch.setattr(type(run.store), "upload", slow)
    syncer = Syncer(run, lambda step, seconds: None, lambda text: None)
    syncer.offer(2, checkpoint(run, 2))
    assert started.wait(30)
    for step in (4, 6):
        syncer.offer(step, checkpoint(run, step))  # returns at once: the trainer never waits
    assert not syncer.drain(0.05)
    may_upload.set()
    assert syncer.drain(30)
    assert committed_steps(run) == [6, 2]


def test_a_failed_upload_is_told_and_tried_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    upload, calls = type(run.store).upload, []

    def flaky(self: Any, source: Path, key: str) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise TransientError("the network blinked")
        upload(self, source, key)

    monkeypatch.setattr(type(run.store), "upload", flaky)
    syncer = Syncer(run, lambda step, seconds: None, failures.append)
    syncer.offer(2, checkpoint(run, 2))
    assert syncer.drain(30)
    assert committed_steps(run) == [2]
    assert "the network blinked" in failures[0]
    assert syncer.failure is None


def test_retention_keeps_the_newest_two(run: Any) -> None:
    syncer = Syncer(run, lambda step, seconds: None, lambda text: None)
    for step in (2, 4, 6, 8):
        syncer.offer(step, checkpoint(run, step))
        assert syncer.drain(30)
    assert committed_steps(run) == [8, 6]
    assert not list(run.store.list(prefix_of(run.id, 2)))


def test_retention_never_lets_a_rejected_later_checkpoint_push_out_a_good_one(run: Any) -> None:
    commit_steps(run, 90, 100)  # left by something that this run did not go on from
    syncer = Syncer(run, lambda step, seconds: None, lambda text: None)
    for step in (2, 4, 6):
        syncer.offer(step, checkpoint(run, step))
        assert syncer.drain(30)
    assert committed_steps(run) == [100, 90, 6, 4]


def test_a_store_that_refuses_is_remembered_as_the_failure(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, source: Path, key: str) -> None:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(type(run.store), "upload", refuse)
    syncer = Syncer(run, lambda step, seconds: None, lambda text: None)
    syncer.offer(2, checkpoint(run, 2))
    assert syncer.drain(30)
    assert "nobody expected this" in str(syncer.failure)
    syncer.offer(4, checkpoint(run, 4))  # the thread lives on
    assert syncer.drain(30)


def test_restore_takes_the_newest_whole_checkpoint_and_tells_what_it_rejected(run: Any) -> None:
    commit_steps(run, 2, 4)
    run.store.put(f"{prefix_of(run.id, 4)}/state.json", b"5")
    warnings: list[str] = []
    assert restore_newest(run, warnings.append) == 2
    assert (run.paths.checkpoints_dir / "checkpoint-2" / "state.json").read_text(encoding="utf-8") == "2"
    assert "step 4 rejected" in warnings[0]
    assert [path.name for path in run.paths.checkpoints_dir.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_without_a_manifest_does_not_exist(run: Any) -> None:
    run.store.put(f"{prefix_of(run.id, 9)}/state.json", b"9")
    assert restore_newest(run, lambda text: None) is None


def test_a_local_leftover_that_was_never_committed_is_removed(run: Any) -> None:
    folder = checkpoint(run, 99)
    assert restore_newest(run, lambda text: None) is None
    assert not folder.exists()


def test_a_checkpoint_of_other_settings_is_not_taken(run: Any, make_run: Callable[..., Any]) -> None:
    commit_steps(run, 2)
    warnings: list[str] = []
    assert restore_newest(make_run(LORA_R="8"), warnings.append) is None
    assert "other settings" in warnings[0]
