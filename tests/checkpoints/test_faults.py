"""A real S3 server behind a proxy that injects faults.

A checkpoint is resumed only if it is, byte for byte, one that was saved.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.lease import Lease, LeaseRecord
from job.checkpoints.manifest import commit
from job.checkpoints.restore import Restored, checkpoint_at, restore_newest
from job.checkpoints.retention import apply_retention, sweep
from job.errors import NodeError, TransientError
from job.paths import Paths
from job.storage import open_store
from job.storage import s3 as s3_module
from tests.fault_proxy import FAULTS, FaultProxy

TRIALS = 200
FILES = {"adapter_model.safetensors": 40_000, "optimizer.safetensors": 90_000, "trainer_state.json": 300}


@pytest.fixture
def proxy(s3_server: str, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
        yield proxy


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten boto3's waits between retries: they would make two hundred trials take an hour."""
    import botocore.retries.standard

    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda self, context: 0.01)
    monkeypatch.setattr(s3_module, "_PAUSES_SECONDS", (0.01, 0.01, 0.01, 0.01))


def checkpoint(folder: Path, step: int, seed: int) -> dict[str, bytes]:
    """Files whose every byte depends on the checkpoint that they belong to."""
    chance = random.Random(f"{seed}/{step}")
    contents = {name: chance.randbytes(size) for name, size in FILES.items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return contents


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}


def patiently(act: Callable[[], Any], tries: int = 20) -> Any:
    """Retry transient failures, as the syncer and the scheduler do. Only exit code 75 may occur."""
    for _ in range(tries - 1):
        try:
            return act()
        except TransientError:
            continue
    return act()


def store_three(run: Any, lease: Lease, scratch: Path, trial: int) -> tuple[dict[int, dict[str, bytes]], list[int]]:
    """Commit the checkpoints of three steps, each once. Returns what was saved, and the steps that were stored."""
    saved: dict[int, dict[str, bytes]] = {}
    stored: list[int] = []
    for step in (2, 4, 6):
        saved[step] = checkpoint(scratch, step, trial)
        place = f"{run.id}/{checkpoint_at(step, 1).folder}"
        with contextlib.suppress(TransientError):  # any other error fails the test
            commit(run.store, place, scratch, run.settings.fingerprint("train"), lease.renew)
            stored.append(step)
            apply_retention(run, lease, frozenset())
    return saved, stored


def start_again(run: Any) -> Restored | None:
    """The next attempt, or None if the faults keep it from starting."""
    with contextlib.suppress(TransientError):
        lease = patiently(lambda: Lease.take(run, lambda text: None, lambda: False))
        patiently(lambda: sweep(run, lease))
        restored: Restored = patiently(lambda: restore_newest(run, lease.record, lambda text: None))
        return restored
    return None


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.slow
def test_in_two_hundred_trials_under_faults_nothing_corrupt_or_partial_is_resumed(
    make_run: Callable[..., Any], tmp_path: Path, proxy: FaultProxy, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.storage.partial.PART_BYTES", 32_768)  # so files are fetched in several parts
    resumed: Counter[str] = Counter()
    template = make_run(STORE_URL="s3://bucket/faults")
    for trial in range(half * TRIALS // 2, (half + 1) * TRIALS // 2):
        run = replace(template, paths=Paths(tmp_path / "results", f"trial-{trial}"))
        proxy.rate = 0.0
        lease = Lease.take(run, lambda text: None, lambda: False)
        proxy.rate = 0.15
        saved, stored = store_three(run, lease, tmp_path / "saved", trial)
        lease.release()
        try:
            restored = start_again(run)
        except NodeError as error:  # the network damaged one file at each of three readings
            if "different forms in 3 readings" not in error.message:
                raise
            resumed["nothing on such a machine"] += 1
            continue
        if restored is None or restored.step is None:
            resumed["nothing" if restored else "not in this start"] += 1
            continue
        there = read(run.paths.checkpoints_dir / f"checkpoint-{restored.step}")
        assert there == saved[restored.step], f"trial {trial}: step {restored.step} is not what was saved"
        resumed["the newest" if stored and restored.step >= max(stored) else "an older one"] += 1
    assert sum(resumed.values()) == TRIALS // 2
    assert resumed["nothing on such a machine"] <= 2, resumed
    assert resumed["the newest"] > TRIALS // 4, resumed  # otherwise the trials show nothing
    assert set(proxy.injected) == set(FAULTS), proxy.injected


@pytest.mark.parametrize("fault", ["503", "reset", "delay", "truncated", "flipped down", "flipped up", "response lost"])
def test_each_single_fault_is_survived_or_reported_and_never_trusted(
    make_run: Callable[..., Any], tmp_path: Path, proxy: FaultProxy, hasty: None, fault: str
) -> None:
    run = make_run(STORE_URL=f"s3://bucket/{tmp_path.name}")
    lease = Lease.take(run, lambda text: None, lambda: False)
    saved = checkpoint(tmp_path / "saved", 2, 0)
    proxy.faults, proxy.rate = (fault,), 0.5
    place = f"{run.id}/{checkpoint_at(2, 1).folder}"
    patiently(lambda: commit(run.store, place, tmp_path / "saved", run.settings.fingerprint("train"), lease.renew))
    restored = patiently(lambda: restore_newest(run, lease.record, lambda text: None))
    assert restored.step == 2
    assert read(run.paths.checkpoints_dir / "checkpoint-2") == saved
    assert proxy.injected[fault] > 0


def test_a_download_that_was_cut_short_resumes_where_it_stopped(
    tmp_path: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.storage.partial.PART_BYTES", 100_000)
    monkeypatch.setattr(s3_module, "_THREADS", 1)
    data = random.Random(3).randbytes(1_050_000)
    (tmp_path / "source").write_bytes(data)
    store = open_store(f"s3://bucket/{tmp_path.name}")
    store.upload(tmp_path / "source", "large.bin")
    fetched: list[str] = []
    get = type(store)._get  # type: ignore[attr-defined]

    def counted(self: Any, key: str, **conditions: str) -> Any:
        fetched.append(conditions["Range"])
        if len(fetched) == 5:
            raise KeyboardInterrupt  # the process ends here
        return get(self, key, **conditions)

    monkeypatch.setattr(type(store), "_get", counted)
    with pytest.raises(KeyboardInterrupt):
        store.download("large.bin", tmp_path / "target")
    journal = next(tmp_path.glob("target.partial-*-parts"))
    assert len(journal.read_text(encoding="ascii").splitlines()) >= 4
    partial = journal.with_name(journal.name.removesuffix("-parts"))
    with partial.open("r+b") as file:  # a part that was lost is fetched again
        file.seek(100_005)
        file.write(b"\0\0\0")
    before = len(fetched)
    store.download("large.bin", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    assert "bytes=0-99999" not in fetched[before:]
    assert "bytes=100000-199999" in fetched[before:]
    assert [path.name for path in tmp_path.glob("target*")] == ["target"]


def test_what_a_killed_upload_left_on_the_server_is_swept(
    make_run: Callable[..., Any], tmp_path: Path, s3_environment: None
) -> None:
    run = make_run(STORE_URL=f"s3://bucket/{tmp_path.name}")
    Lease.take(run, lambda text: None, lambda: False).release()
    key = f"{tmp_path.name}/{run.id}/checkpoints/step-00000002/attempt-0001/optimizer.safetensors"
    run.store.client.create_multipart_upload(Bucket="bucket", Key=key)
    lease = Lease.take(run, lambda text: None, lambda: False)
    assert sweep(run, lease) == 1
    uploads = run.store.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    assert not [upload for upload in uploads if upload["Key"] == key]


def test_a_stale_list_can_hide_a_checkpoint_but_not_bring_a_deleted_one_back(
    make_run: Callable[..., Any], tmp_path: Path, proxy: FaultProxy
) -> None:
    run = make_run(STORE_URL=f"s3://bucket/{tmp_path.name}")
    lease = Lease.take(run, lambda text: None, lambda: False)
    saved = {}
    for step in (2, 4, 6):
        saved[step] = checkpoint(tmp_path / "saved", step, 0)
        commit(
            run.store,
            f"{run.id}/{checkpoint_at(step, 1).folder}",
            tmp_path / "saved",
            run.settings.fingerprint("train"),
        )
        if step == 4:
            proxy._lists.clear()
            lease.record.commits(run, "checkpoints")  # the proxy remembers this list, of steps 2 and 4
            remembered = dict(proxy._lists)
    apply_retention(run, lease, frozenset())
    proxy._lists.update(remembered)
    proxy.faults, proxy.rate = ("stale list",), 1.0
    warnings: list[str] = []
    restored = restore_newest(run, LeaseRecord.read(run), warnings.append)
    assert proxy.injected["stale list"] > 0
    assert restored.step == 4  # 6 is hidden, and 2 is listed but deleted
    assert read(run.paths.checkpoints_dir / "checkpoint-4") == saved[4]
