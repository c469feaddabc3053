"""A checkpoint that is whole on this disk counts, whether or not the store has taken it."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints import manifest
from job.checkpoints.lease import Lease
from job.checkpoints.manifest import Manifest, Rejected, mark, restore
from job.checkpoints.restore import Restored, committed_checkpoints, local_checkpoints, restore_newest, step_of
from job.checkpoints.syncer import Syncer
from job.errors import NodeError, TransientError
from job.storage.local import LocalStore
from tests.checkpoints.test_syncer import checkpoint, commit_steps
from tests.conftest import Job, contents, finished, published, read_until
from tests.fault_proxy import FaultProxy


@pytest.fixture
def run(make_run: Callable[..., Any]) -> Any:
    return make_run()


@pytest.fixture
def lease(run: Any) -> Lease:
    return Lease.take(run, lambda text: None, lambda: False)


def marked_checkpoint(run: Any, step: int) -> Path:
    folder = checkpoint(run, step)
    mark(folder, Manifest.of(folder, run.fingerprint("train")))
    return folder


def test_a_newer_whole_checkpoint_on_this_disk_is_used_and_everything_else_there_is_removed(
    run: Any, lease: Lease
) -> None:
    commit_steps(run, 5)
    newest = marked_checkpoint(run, 60)
    marked_checkpoint(run, 40)
    checkpoint(run, 80)  # never marked: its writing was interrupted
    restored = restore_newest(run, lease.record, lambda text: None)
    assert (restored.step, restored.unstored, restored.commit) == (60, newest, None)
    assert [path.name for path in run.paths.checkpoints_dir.iterdir()] == ["checkpoint-60"]


def test_a_damaged_checkpoint_on_this_disk_gives_way_to_the_one_in_the_store(run: Any, lease: Lease) -> None:
    commit_steps(run, 5)
    folder, told = marked_checkpoint(run, 60), []
    state = (folder / "state.json").stat()
    (folder / "state.json").write_text("61", encoding="utf-8")
    os.utime(folder / "state.json", ns=(state.st_atime_ns, state.st_mtime_ns))  # a bit flipped: no time tells
    restored = restore_newest(run, lease.record, told.append)
    assert restored.step == 5
    assert "step 60 on this disk is damaged" in told[0]


def test_an_older_checkpoint_on_this_disk_or_one_of_other_settings_is_not_used(
    run: Any, lease: Lease, make_run: Callable[..., Any]
) -> None:
    marked_checkpoint(run, 3)
    commit_steps(run, 5)
    assert restore_newest(run, lease.record, lambda text: None).step == 5
    marked_checkpoint(run, 60)
    assert [path.name for path in local_checkpoints(run)][:1] == ["checkpoint-60"]
    assert local_checkpoints(make_run(LEARNING_RATE="0.5")) == []


def test_a_checkpoint_is_marked_while_an_upload_hangs_and_stays_when_the_job_ends(
    run: Any, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, started = threading.Event(), threading.Event()

    def hang(self: Any, source: Path, key: str) -> None:
        started.set()
        over.wait(30)
        raise TransientError("the uplink is slow")

    monkeypatch.setattr(LocalStore, "upload", hang)
    syncer = Syncer(run, lease, Restored(None), lambda step, seconds: None, lambda text: None)
    syncer.offer(5, checkpoint(run, 5))
    assert started.wait(30)
    syncer.offer(60, checkpoint(run, 60))
    while not local_checkpoints(run) or local_checkpoints(run)[0].name != "checkpoint-60":
        assert not syncer.drain(0.01)
    over.set()
    syncer.close()
    assert local_checkpoints(run)[0].name == "checkpoint-60"


def refusing_checkpoints(upstream: str) -> FaultProxy:
    """A store that takes everything but checkpoints and results: to those it answers 503."""

    class Refusing(FaultProxy):
        def draw(self, method: str, path: str) -> str | None:
            wanted = method in ("PUT", "POST") and re.search(r"/(step-\d+|stages/train)/", path)
            return "503" if self.rate and wanted else None

    return Refusing(upstream, rate=1.0)


@pytest.fixture
def refusing(s3_server: str) -> Iterator[FaultProxy]:
    with refusing_checkpoints(s3_server) as proxy:
        yield proxy


@pytest.mark.xdist_group("uninterrupted")
def test_training_behind_a_store_that_takes_nothing_resumes_from_this_disk_and_ends_as_if_undisturbed(
    job: Job, uninterrupted: Job, refusing: FaultProxy, tmp_path: Path, s3_environment: None
) -> None:
    """Steps 1 to 6 are trained while the store answers 503: none of them is trained again."""
    job.environment |= {
        "AWS_ENDPOINT_URL": refusing.url, "FT_STORE_URL": f"s3://bucket/{tmp_path.name}", "FT_LOG_LEVEL": "debug",
        "AWS_MAX_ATTEMPTS": "1",
    }  # fmt: skip
    first = job.run()
    assert first.code == 75, first.stderr
    folder = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"
    assert (folder / "train" / "MANIFEST.json").exists()
    refusing.rate = 0.0
    second = job.run()
    assert second.code == 0, second.stderr
    assert any("Stage train was finished by an earlier start" in event.get("message", "") for event in second.events)
    assert not any(event.get("stage") == "train" and event.get("event") == "progress" for event in second.events)
    adapter = "adapter/adapter_model.safetensors"
    assert contents(published(job))[adapter] == contents(published(uninterrupted))[adapter]


def test_a_stopped_training_behind_a_store_that_takes_nothing_resumes_where_it_stopped(
    job: Job, refusing: FaultProxy, tmp_path: Path, s3_environment: None
) -> None:
    job.environment |= {
        "FT_STAGES": "train",
        "FT_MAX_STEPS": "60",
        "FT_SAVE_STEPS": "1000",
        "FT_STOP_GRACE_SECONDS": "10",
    }
    straight = job.run(FT_OUTPUT_DIR=str(tmp_path / "straight"))
    assert straight.code == 0, straight.stderr
    job.environment |= {"AWS_ENDPOINT_URL": refusing.url, "FT_STORE_URL": f"s3://bucket/{tmp_path.name}"}
    process = job.start()
    read_until(process, event="progress", stage="train", done=3)
    process.send_signal(signal.SIGHUP)
    stopped = finished(process, *process.communicate(timeout=60))
    assert stopped.code == 75, stopped.stderr
    refusing.rate = 0.0
    again = job.run()
    assert again.code == 0, again.stderr
    said = [event for event in again.events if event.get("message", "").startswith("Resuming from")]
    assert [
        event["step"] >= 3 and "on this disk, which the store does not have" in event["message"] for event in said
    ] == [True]
    adapter = "runs/test-run/train/adapter/adapter_model.safetensors"
    resumed = Path(job.environment["FT_OUTPUT_DIR"]) / adapter
    assert resumed.read_bytes() == (tmp_path / "straight" / adapter).read_bytes()


# -- a machine that damages what it reads ----------------------------------------------------------------------------


def test_a_machine_that_reads_something_else_each_time_is_unfit_and_the_store_keeps_its_copy(
    run: Any, lease: Lease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_steps(run, 5)
    place, download, reads = committed_checkpoints(run, lease.record)[0], LocalStore.download, []

    def flip(self: LocalStore, key: str, target: Path) -> None:
        download(self, key, target)
        data = bytearray(target.read_bytes())
        data[0] ^= 1 << len(reads) % 8
        reads.append(key)
        target.write_bytes(bytes(data))

    monkeypatch.setattr(LocalStore, "download", flip)
    with pytest.raises(NodeError, match="3 different forms") as caught:
        restore(run.store, f"{run.id}/{place.folder}", tmp_path / "restored")
    assert caught.value.retry == "elsewhere"
    monkeypatch.undo()
    restored = restore(run.store, f"{run.id}/{place.folder}", tmp_path / "restored")
    assert restored.holds(tmp_path / "restored")


def test_a_copy_that_is_the_same_wrong_one_at_each_reading_is_damaged_in_the_store(
    run: Any, lease: Lease, tmp_path: Path
) -> None:
    commit_steps(run, 5)
    place = committed_checkpoints(run, lease.record)[0]
    run.store.put(f"{run.id}/{place.folder}/state.json", b"6")
    with pytest.raises(Rejected, match="differs from its manifest"):
        restore(run.store, f"{run.id}/{place.folder}", tmp_path / "restored")


# -- what vouches for files --------------------------------------------------------------------------------------------


def test_files_are_durable_before_the_marker_that_vouches_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder is synced, then the marker is renamed into place, then its folder is synced."""
    folder, order = tmp_path / "stage", []
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "rows").write_text("rows", encoding="utf-8")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "blob").write_text("weights", encoding="utf-8")
    (folder / "model").symlink_to(tmp_path / "cache" / "blob")
    fsync, replace = os.fsync, os.replace

    def note(descriptor: int) -> None:
        order.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removeprefix(f"{tmp_path}/"))
        fsync(descriptor)

    def note_rename(source: Any, target: Any) -> None:
        order.append(f"→ {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", note_rename)
    manifest.mark(folder, Manifest.of(folder, "f"))
    marked_at = order.index("→ MANIFEST.json")
    assert {"stage/deep/rows", "cache/blob", "cache", "stage/deep", "stage"} <= set(order[:marked_at])
    assert order[marked_at + 1 :] == ["stage"]


def test_a_marker_holds_when_the_clock_is_set_back_while_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("rows", encoding="utf-8")
    ahead = time.time_ns() + 600 * 10**9
    os.utime(tmp_path / "rows", ns=(ahead, ahead))
    manifest.mark(tmp_path, Manifest.of(tmp_path, "f"))
    assert manifest.marked(tmp_path) is not None


def test_another_file_under_the_same_name_is_noticed_whatever_its_time_and_size(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("rows", encoding="utf-8")
    folder = tmp_path / "download"
    folder.mkdir()
    (folder / "rows").symlink_to(tmp_path / "theirs")
    manifest.mark(folder, Manifest.of(folder, "f"))
    assert manifest.marked(folder, replaced=True) is not None
    times = (tmp_path / "theirs").stat()
    (tmp_path / "new").write_text("cows", encoding="utf-8")
    os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` and rsync do
    os.replace(tmp_path / "new", tmp_path / "theirs")
    assert manifest.marked(folder, replaced=True) is None


def test_files_with_partial_in_their_name_are_part_of_an_artefact(tmp_path: Path) -> None:
    (tmp_path / "rows.partial.jsonl").write_text("rows", encoding="utf-8")
    assert [entry.path for entry in Manifest.of(tmp_path, "f").files] == ["rows.partial.jsonl"]


def test_an_adopted_checkpoint_is_stored_while_the_trainer_reads_it(run: Any, lease: Lease) -> None:
    from job.report.console import open_console
    from job.supervision.checkpointing import Checkpointing
    from job.supervision.journal import Journal
    from job.supervision.stop import StopRequest

    folder = marked_checkpoint(run, 60)
    journal = Journal(run, open_console("json", "error", run.id))
    stored: list[str] = []
    checkpointing = Checkpointing(
        run, journal, StopRequest(run, lambda: None, print), lambda: None, lambda: stored.append("")
    )
    assert checkpointing.resume(lease) is None
    checkpointing.finish()
    assert [step_of(found) for found in committed_checkpoints(run, lease.record)] == [60]
    assert json.loads((folder / "state.json").read_text(encoding="utf-8")) == 60
    assert stored == [""]
