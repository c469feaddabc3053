"""Checkpoints are stored while training continues. Old ones are deleted and damaged ones are skipped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.lease import Lease
from job.checkpoints.manifest import commit
from job.checkpoints.restore import Restored, checkpoint_at, committed_checkpoints, restore_newest, step_of
from job.checkpoints.retention import apply_retention, sweep
from job.checkpoints.syncer import Syncer
from job.errors import PermissionRefused, TransientError


@pytest.fixture
def run(make_run: Callable[..., Any]) -> Any:
    return make_run()


@pytest.fixture
def lease(run: Any) -> Lease:
    return Lease.take(run, lambda text: None, lambda: False)


def checkpoint(run: Any, step: int) -> Path:
    folder: Path = run.paths.checkpoints_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(str(step), encoding="utf-8")
    return folder


def prefix(run: Any, step: int, attempt: int = 1) -> str:
    return f"{run.id}/{checkpoint_at(step, attempt).folder}"


def commit_steps(run: Any, *steps: int, attempt: int = 1) -> None:
    for step in steps:
        commit(run.store, prefix(run, step, attempt), checkpoint(run, step), run.settings.fingerprint("train"))


def committed_steps(run: Any, lease: Lease) -> list[int]:
    return [step_of(found) for found in committed_checkpoints(run, lease.record)]


def syncer_of(run: Any, lease: Lease, warn: Callable[[str], None] = lambda text: None) -> Syncer:
    return Syncer(run, lease, Restored(None), lambda step, seconds: None, warn)


def test_an_offered_checkpoint_is_committed_and_the_local_copy_removed(run: Any, lease: Lease) -> None:
    committed: list[int] = []
    syncer = Syncer(run, lease, Restored(None), lambda step, seconds: committed.append(step), lambda text: None)
    folder = checkpoint(run, 2)
    syncer.offer(2, folder)
    assert syncer.drain(30)
    syncer.close()
    assert committed == [2] == committed_steps(run, lease)
    assert not folder.exists()


def test_only_the_newest_checkpoint_waits_while_an_upload_runs(
    run: Any, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_upload, started = threading.Event(), threading.Event()
    upload = type(run.store).upload

    def slow(self: Any, source: Path, key: str) -> None:
        started.set()
        assert may_upload.wait(30)
        upload(self, source, key)

    monkeypatch.setattr(type(run.store), "upload", slow)
    syncer = syncer_of(run, lease)
    syncer.offer(2, checkpoint(run, 2))
    assert started.wait(30)
    for step in (4, 6):
        syncer.offer(step, checkpoint(run, step))  # returns at once: the trainer never waits
    assert not syncer.drain(0.05)
    deadline = time.monotonic() + 30
    while (names := sorted(path.name for path in run.paths.checkpoints_dir.iterdir())) != [
        "checkpoint-2",
        "checkpoint-6",
    ]:
        assert time.monotonic() < deadline, names
        time.sleep(0.01)
    may_upload.set()
    assert syncer.drain(30)
    assert committed_steps(run, lease) == [6, 2]


def test_a_failed_upload_is_reported_and_retried(run: Any, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    upload, calls = type(run.store).upload, []

    def flaky(self: Any, source: Path, key: str) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise TransientError("the network blinked")
        upload(self, source, key)

    monkeypatch.setattr(type(run.store), "upload", flaky)
    syncer = syncer_of(run, lease, failures.append)
    syncer.offer(2, checkpoint(run, 2))
    assert syncer.drain(30)
    assert committed_steps(run, lease) == [2]
    assert "the network blinked" in failures[0]
    assert syncer.failure is None


def test_a_newer_checkpoint_replaces_one_that_cannot_be_stored(
    run: Any, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, upload = threading.Event(), type(run.store).upload

    def refuse(self: Any, source: Path, key: str) -> None:
        if "step-00000002" in key:
            failed.set()
            raise PermissionRefused("not this one")
        upload(self, source, key)

    monkeypatch.setattr(type(run.store), "upload", refuse)
    syncer = syncer_of(run, lease)
    syncer.offer(2, checkpoint(run, 2))
    assert failed.wait(30)
    syncer.offer(4, checkpoint(run, 4))
    assert syncer.drain(30)
    assert committed_steps(run, lease) == [4]
    assert syncer.failure is None
    assert not list(run.paths.checkpoints_dir.iterdir())  # a full disk would end the training


def test_an_unexpected_error_is_remembered_and_the_thread_lives_on(
    run: Any, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, upload, tries = threading.Event(), type(run.store).upload, []

    def break_once(self: Any, source: Path, key: str) -> None:
        tries.append(key)
        if len(tries) == 1:
            raise RuntimeError("nobody expected this")
        upload(self, source, key)

    seen: list[Any] = []
    monkeypatch.setattr(type(run.store), "upload", break_once)
    syncer = syncer_of(run, lease, lambda text: (seen.append(syncer.failure), told.set()))  # type: ignore[func-returns-value]
    syncer.offer(2, checkpoint(run, 2))
    assert told.wait(30)
    assert "nobody expected this" in str(seen[0])
    assert syncer.drain(30)
    assert committed_steps(run, lease) == [2]


def test_a_superseded_attempt_commits_nothing(run: Any, lease: Lease, make_run: Callable[..., Any]) -> None:
    other = make_run(OUTPUT_DIR=str(run.paths.output_dir / "elsewhere"), STORE_URL=run.store.url)
    lease.release()
    Lease.take(other, lambda text: None, lambda: False)
    told: list[str] = []
    syncer = syncer_of(run, lease, told.append)
    syncer.offer(2, checkpoint(run, 2))
    assert syncer.drain(30)
    assert "has taken over" in told[0]
    assert committed_steps(run, lease) == []


def test_retention_keeps_the_newest_two(run: Any, lease: Lease) -> None:
    syncer = syncer_of(run, lease)
    for step in (2, 4, 6, 8):
        syncer.offer(step, checkpoint(run, step))
        assert syncer.drain(30)
    assert committed_steps(run, lease) == [8, 6]
    assert not list(run.store.list(prefix(run, 2)))


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(run: Any, lease: Lease) -> None:
    commit_steps(run, 2, 90, 100)
    damaged = frozenset({checkpoint_at(90, 1), checkpoint_at(100, 1)})
    assert apply_retention(run, lease, damaged) == []  # one good checkpoint is too few to delete anything
    commit_steps(run, 4)
    apply_retention(run, lease, damaged)
    assert committed_steps(run, lease) == [4, 2]


def test_restore_takes_the_newest_intact_checkpoint_and_reports_what_it_rejected(run: Any, lease: Lease) -> None:
    commit_steps(run, 2, 4)
    run.store.put(f"{prefix(run, 4)}/state.json", b"5")
    warnings: list[str] = []
    restored = restore_newest(run, lease.record, warnings.append)
    assert restored == Restored(checkpoint_at(2, 1), frozenset({checkpoint_at(4, 1)}))
    assert (run.paths.checkpoints_dir / "checkpoint-2" / "state.json").read_text(encoding="utf-8") == "2"
    assert "step 4 rejected" in warnings[0]
    assert [path.name for path in run.paths.checkpoints_dir.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_without_a_manifest_does_not_exist_and_is_swept_by_the_next_attempt(
    run: Any, lease: Lease
) -> None:
    run.store.put(f"{prefix(run, 9)}/state.json", b"9")
    assert restore_newest(run, lease.record, lambda text: None).step is None
    assert sweep(run, lease) == 0  # it may be ours, still being written
    lease.release()
    following = Lease.take(run, lambda text: None, lambda: False)
    assert sweep(run, following) == 1
    assert not list(run.store.list(f"{run.id}/checkpoints"))


def test_a_local_leftover_that_was_never_committed_is_removed(run: Any, lease: Lease) -> None:
    folder = checkpoint(run, 99)
    assert restore_newest(run, lease.record, lambda text: None).step is None
    assert not folder.exists()


def test_a_checkpoint_with_other_settings_is_not_used(run: Any, lease: Lease, make_run: Callable[..., Any]) -> None:
    commit_steps(run, 2)
    warnings: list[str] = []
    assert restore_newest(make_run(LORA_R="8"), lease.record, warnings.append).step is None
    assert "other settings" in warnings[0]


def test_a_failing_callback_does_not_stop_later_checkpoints_from_being_stored(run: Any, lease: Lease) -> None:
    def fail(step: int, seconds: float) -> None:
        raise OSError(28, "No space left on device")

    syncer = Syncer(run, lease, Restored(None), fail, lambda text: None)
    for step in (2, 4):
        syncer.offer(step, checkpoint(run, step))
        assert syncer.drain(30)
    assert committed_steps(run, lease) == [4, 2]
