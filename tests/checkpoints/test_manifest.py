"""A manifest vouches for its files. A file that differs from it is rejected, for whatever reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints.manifest import MANIFEST, Manifest, Rejected, commit, mark, marked, read, restore
from job.storage import Store, open_store

PREFIX = "run/checkpoints/step-00000002"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(b"weights" * 100)
    (folder / "deep" / "state.json").write_bytes(b"{}")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_what_is_committed_is_restored_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    committed = commit(store, PREFIX, folder, "fingerprint")
    assert read(store, PREFIX) == committed
    assert restore(store, PREFIX, tmp_path / "back") == committed
    assert (tmp_path / "back" / "adapter.safetensors").read_bytes() == b"weights" * 100
    assert marked(tmp_path / "back") == committed


def test_the_manifest_is_written_after_every_file(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    upload, put = type(store).upload, type(store).put_if_absent
    monkeypatch.setattr(
        type(store), "upload", lambda self, source, key: (calls.append(key), upload(self, source, key))[1]
    )
    monkeypatch.setattr(
        type(store), "put_if_absent", lambda self, key, data: (calls.append(key), put(self, key, data))[1]
    )
    commit(store, PREFIX, folder, "fingerprint")
    assert calls == [f"{PREFIX}/adapter.safetensors", f"{PREFIX}/deep/state.json", f"{PREFIX}/{MANIFEST}"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "deep/state.json", MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "deleted"])
def test_any_damage_to_any_file_is_detected(store: Store, folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    commit(store, PREFIX, folder, "fingerprint")
    key = f"{PREFIX}/{name}"
    data = store.get(key)
    if damage == "deleted":
        store.delete(key)
    else:
        store.put(key, data[:-1] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(Rejected):
        restore(store, PREFIX, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_manifest_cannot_write_outside_its_folder(store: Store, tmp_path: Path) -> None:
    store.put(
        f"{PREFIX}/{MANIFEST}",
        b'{"fingerprint": "f", "created": "", "files": [{"path": "../../evil", "size": 1, "sha256": ""}]}',
    )
    with pytest.raises(Rejected, match="outside itself"):
        restore(store, PREFIX, tmp_path / "back")


@pytest.mark.parametrize(
    "odd",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"fingerprint": "f", "created": "", "files": [{"path": "a", "size": Infinity, "sha256": ""}]}',
    ],
)
def test_what_is_no_manifest_is_rejected(store: Store, tmp_path: Path, odd: bytes) -> None:
    store.put(f"{PREFIX}/{MANIFEST}", odd)
    with pytest.raises(Rejected):
        restore(store, PREFIX, tmp_path / "back")


def test_committing_the_same_content_again_changes_nothing_and_other_content_replaces_it(
    store: Store, folder: Path
) -> None:
    first = commit(store, PREFIX, folder, "fingerprint")
    assert commit(store, PREFIX, folder, "fingerprint").created == first.created
    (folder / "deep" / "state.json").write_bytes(b"{1}")
    second = commit(store, PREFIX, folder, "fingerprint")
    assert second.files != first.files
    assert read(store, PREFIX) == second


def test_an_unreadable_manifest_is_written_again(store: Store, folder: Path) -> None:
    commit(store, PREFIX, folder, "fingerprint")
    store.put(f"{PREFIX}/{MANIFEST}", b"{")
    assert read(store, PREFIX) is None
    assert read(store, PREFIX) != commit(store, PREFIX, folder, "fingerprint") == read(store, PREFIX)


def test_a_marked_folder_that_lost_a_file_is_not_complete(folder: Path) -> None:
    mark(folder, Manifest.of(folder, "fingerprint"))
    assert marked(folder) is not None
    (folder / "deep" / "state.json").write_bytes(b"longer")
    assert marked(folder) is None
    (folder / "deep" / "state.json").unlink()
    assert marked(folder) is None


def test_a_file_rewritten_with_the_same_size_is_noticed(folder: Path) -> None:
    mark(folder, Manifest.of(folder, "fingerprint"))
    time.sleep(0.02)
    (folder / "deep" / "state.json").write_bytes(b"[]")
    assert marked(folder) is None


def test_a_commit_whose_response_was_lost_is_recognised_as_ours(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(store).put_if_absent

    def put_twice(self: Any, key: str, data: bytes) -> None:
        put(self, key, data)
        put(self, key, data)  # as a client does when it retries a request that had succeeded

    monkeypatch.setattr(type(store), "put_if_absent", put_twice)
    assert read(store, PREFIX) is None
    assert commit(store, PREFIX, folder, "fingerprint") == read(store, PREFIX)


def test_hashing_follows_links_so_a_linked_model_is_covered(tmp_path: Path, folder: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model").symlink_to(folder)
    assert [entry.path for entry in Manifest.of(linked, "f").files] == [
        "model/adapter.safetensors",
        "model/deep/state.json",
    ]
