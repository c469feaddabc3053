"""One contract for every store: a folder, and S3 on a real server (ministack). A new store is one more parameter."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from job.errors import PermissionRefused, SettingsError, TransientError
from job.storage import Conflict, Store, open_store
from tests.conftest import free_port, wait_for


@pytest.fixture(params=["folder", "folder with an awkward name", "s3", "s3 with a prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param.startswith("s3"):
        request.getfixturevalue("s3_environment")
        return open_store(f"s3://bucket/{tmp_path.name}" + ("/deep/prefix" if "prefix" in request.param else ""))
    return open_store(str(tmp_path / ('it\'s "a"\nstore' if "awkward" in request.param else "store")))


def test_what_was_put_is_read_back(store: Store) -> None:
    store.put("run/a.json", b"one")
    store.put("run/a.json", b"two")
    assert store.get("run/a.json") == b"two"


def test_a_missing_key_is_a_file_not_found_error_and_nothing_else(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.get("run/absent")
    with pytest.raises(FileNotFoundError):
        store.download("run/absent", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_put_if_absent_refuses_an_existing_key_and_leaves_it_unchanged(store: Store) -> None:
    store.put_if_absent("run/MANIFEST.json", b"first")
    with pytest.raises(Conflict):
        store.put_if_absent("run/MANIFEST.json", b"second")
    assert store.get("run/MANIFEST.json") == b"first"


def test_exactly_one_of_many_concurrent_writers_wins(store: Store) -> None:
    outcomes: list[str] = []

    def write(number: int) -> None:
        try:
            store.put_if_absent("run/lease", str(number).encode())
            outcomes.append(str(number))
        except Conflict:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert store.get("run/lease") == outcomes[0].encode()


def test_a_file_larger_than_one_part_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    data = os.urandom(9 * 1024 * 1024 + 7)  # boto3 splits at 8 MiB
    (tmp_path / "source").write_bytes(data)
    store.upload(tmp_path / "source", "run/large.bin")
    store.download("run/large.bin", tmp_path / "new" / "folder" / "target")
    assert (tmp_path / "new" / "folder" / "target").read_bytes() == data
    assert not list((tmp_path / "new").rglob("*.partial-*"))


def test_listing_gives_keys_and_sizes_below_a_prefix_only(store: Store) -> None:
    for key in ("run/a", "run/deep/b", "run-2/c"):
        store.put(key, b"12345")
    assert sorted(store.list("run")) == [("run/a", 5), ("run/deep/b", 5)]
    assert list(store.list("absent")) == []


def test_deleting_is_final_and_harmless_a_second_time(store: Store) -> None:
    store.put("run/deep/a", b"1")
    store.delete("run/deep/a")
    store.delete("run/deep/a")
    assert list(store.list("run")) == []


def test_a_bucket_that_does_not_exist_is_a_settings_error(s3_environment: None) -> None:
    with pytest.raises(SettingsError, match="no bucket 'nowhere'"):
        open_store("s3://nowhere/prefix").put("key", b"data")


def test_an_unreachable_server_is_transient_and_never_reads_as_absent(
    monkeypatch: pytest.MonkeyPatch, s3_environment: None
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = open_store("s3://bucket/prefix")
    with pytest.raises(TransientError):
        store.get("key")


def test_missing_credentials_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, s3_environment: None) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(PermissionRefused, match="AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket/prefix").get("key")


def test_wrong_credentials_are_refused_and_never_read_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto checks signatures when told to; ministack does not."""
    port = free_port()
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "0"}
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(port, process)
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "wrong",
            "AWS_SECRET_ACCESS_KEY": "wrong",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PermissionRefused):
            open_store("s3://bucket/prefix").get("key")
    finally:
        process.kill()
        process.wait()


def test_a_key_cannot_lead_out_of_a_folder_store(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out"):
        open_store(str(tmp_path / "store")).put("../outside", b"data")


def test_a_folder_without_permission_is_refused_and_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from job.errors import NodeError

    store = open_store(str(tmp_path / "store"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match="No space left") as caught:
        store.put("key", b"data")
    assert caught.value.exit_code == 69

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(PermissionRefused):
        store.put("key", b"data")
