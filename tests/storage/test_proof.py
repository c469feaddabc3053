"""Preflight does to the store what the job will do later, and stores that cannot do it are found there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.errors import SettingsError
from job.storage import Conflict, Store, open_store
from job.storage.local import LocalStore
from job.storage.proof import prove


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
        return open_store(f"s3://bucket/{tmp_path.name}")
    return open_store(str(tmp_path / "store"))


def test_a_good_store_passes_and_nothing_is_left_in_it(store: Store) -> None:
    prove(store, "run")
    assert list(store.list("")) == []


def overwrites(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStore, "put_if_absent", LocalStore.put)


def ignores_if_match(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStore, "put_if_unchanged", lambda self, key, data, version: self.put(key, data) or "any")


def refuses_every_if_match(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    def refuse(self: LocalStore, key: str, data: bytes, version: str) -> str:
        raise Conflict(key)

    patch.setattr(LocalStore, "put_if_unchanged", refuse)


def returns_other_bytes(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    get = LocalStore.get
    patch.setattr(LocalStore, "get", lambda self, key: get(self, key)[:-1])


def lists_nothing(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    def nothing(self: LocalStore, prefix: str) -> Iterator[tuple[str, int]]:
        return iter(())

    patch.setattr(LocalStore, "list", nothing)


def keeps_what_is_deleted(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStore, "delete", lambda self, key: None)


def damages_files(store: LocalStore, patch: pytest.MonkeyPatch) -> None:
    def download(self: LocalStore, key: str, target: Path) -> None:
        target.write_bytes(b"something else")

    patch.setattr(LocalStore, "download", download)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (overwrites, "If-None-Match"),
        (ignores_if_match, "two jobs could overwrite each other"),
        (refuses_every_if_match, "refuses a conditional write"),
        (returns_other_bytes, "other bytes than were written"),
        (lists_nothing, "does not list"),
        (keeps_what_is_deleted, "still lists"),
        (damages_files, "another file than was sent"),
    ],
)
def test_a_store_that_cannot_hold_checkpoints_is_refused_with_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None], told: str
) -> None:
    store = LocalStore(tmp_path / "store")
    fault(store, monkeypatch)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SettingsError, match=told) as caught:
        prove(store, "run")
    assert "conditional writes" in caught.value.hint


def test_one_stale_listing_does_not_end_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fresh, answers = LocalStore(tmp_path / "store"), LocalStore.list, []

    def stale(self: LocalStore, prefix: str) -> Iterator[tuple[str, int]]:
        answers.append(prefix)
        return iter([(f"{prefix}/record", 5)]) if len(answers) == 2 else fresh(self, prefix)

    monkeypatch.setattr(LocalStore, "list", stale)
    prove(store, "run")
    assert len(answers) == 3


@pytest.mark.parametrize(
    ("call", "number"),
    [("flock", errno.ENOSYS), ("flock", errno.EOPNOTSUPP), ("link", errno.EPERM), ("link", errno.EOPNOTSUPP)],
    ids=["Lustre without flock", "no locks", "SMB without hard links", "no hard links"],
)
def test_a_file_system_without_locks_or_hard_links_is_refused_with_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    import fcntl

    def cannot(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl if call == "flock" else os, call, cannot)
    with pytest.raises(SettingsError, match="file system of the store folder") as caught:
        prove(LocalStore(tmp_path / "store"), "run")
    assert caught.value.exit_code == 78


def test_the_stores_clock_says_how_old_an_object_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("run/lease.json", b"{}")
    monkeypatch.setattr("time.time", lambda: 4e9)  # this machine's clock is of no importance
    assert -2 <= store.age_seconds("run/lease.json") < 60
    with pytest.raises(FileNotFoundError):
        store.age_seconds("run/absent")


@pytest.mark.parametrize("url", ["s3://bucket/data#1/x", "s3://bucket/what?is=this", "s3://bucket/a%20b/ü"])
def test_an_s3_url_is_taken_as_it_is_written(url: str, s3_environment: None) -> None:
    store = open_store(url)
    assert store.url == url
    store.put("key", b"data")
    assert open_store("s3://bucket").get(f"{url.removeprefix('s3://bucket/')}/key") == b"data"


def test_a_key_with_partial_in_its_name_is_listed_like_any_other(store: Store) -> None:
    store.put("run/rows.partial.jsonl", b"1")
    store.put("run/a.partial-file/rows.jsonl", b"2")
    assert sorted(key for key, _ in store.list("run")) == ["run/a.partial-file/rows.jsonl", "run/rows.partial.jsonl"]
