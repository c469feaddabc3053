"""Proves that a store can do what the job will ask of it, before anybody waits for a GPU.

The lease needs two conditional writes that hold against a stale writer, checkpoints need files sent in parts, and resume
needs a listing. A store that lacks one of them fails hours later, or lets two attempts commit side by side.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from job.errors import SettingsError
from job.storage import Conflict, Store

_LISTING_WAITS = (0.5, 1.0, 2.0)  # seconds
_ELSEWHERE = (
    "Use a store with conditional writes as FT_STORE_URL: Amazon S3, Cloudflare R2, MinIO, Ceph, or a folder on a file system "
    "with locks and hard links."
)


def prove(store: Store, prefix: str) -> None:
    """Do once, below `prefix/`, all that the job will do: write, compare and swap, list, send in parts, read, delete.

    Raises SettingsError if the store does something else than was asked, or cannot do it, and otherwise what the store
    raises. Leaves nothing behind.
    """
    folder = f"{prefix}/preflight-{uuid.uuid4().hex[:8]}"
    key, parts = f"{folder}/record", f"{folder}/file"
    try:
        _prove_conditions(store, key)
        _prove_files(store, parts)
        if not _comes_true(lambda: {key, parts} <= {name for name, _ in store.list(folder)}):
            raise _cannot(store, f"does not list what was written to it below {folder}")
    finally:
        for name in (key, parts):
            with contextlib.suppress(Exception):  # what went wrong before is told instead
                store.delete(name)
    store.delete(key)
    if not _comes_true(lambda: not list(store.list(folder))):
        raise _cannot(store, "still lists an object that was deleted")


def _prove_conditions(store: Store, key: str) -> None:
    first, second, third = b"first", b"second", b"third"
    with contextlib.suppress(
        Conflict
    ):  # the name is ours alone, so our own write was retried after its answer was lost
        store.put_if_absent(key, first)
    if not _refuses(lambda: store.put_if_absent(key, second)):
        raise _cannot(store, "overwrote an object that a conditional write (If-None-Match) should have kept")
    found, version = store.get_with_version(key)
    if found != first:
        raise _cannot(store, "returned other bytes than were written")
    try:
        store.put_if_unchanged(key, second, version)
    except Conflict:
        if store.get(key) != second:  # else the answer to our own write was lost
            raise _cannot(store, "refuses a conditional write (If-Match) of an unchanged object") from None
    if not _refuses(lambda: store.put_if_unchanged(key, third, version)) or store.get(key) != second:
        raise _cannot(store, "ignores the condition (If-Match) of a write, so two jobs could overwrite each other")


def _prove_files(store: Store, key: str) -> None:
    with tempfile.TemporaryDirectory(prefix="finetune-job-") as scratch:
        sent, received = Path(scratch, "sent"), Path(scratch, "received")
        sent.write_bytes(b"The store works.")
        store.upload(sent, key, always_in_parts=True)
        store.download(key, received)
        if received.read_bytes() != sent.read_bytes():
            raise _cannot(store, "returned another file than was sent in parts")


def _comes_true(is_so: Callable[[], bool]) -> bool:
    """Whether a listing is as it should be, if need be after some seconds: one stale answer is no reason to give up."""
    for wait in _LISTING_WAITS:
        if is_so():
            return True
        time.sleep(wait)
    return is_so()


def _refuses(write: Callable[[], object]) -> bool:
    try:
        write()
    except Conflict:
        return True
    return False


def _cannot(store: Store, what: str) -> SettingsError:
    return SettingsError(f"The store {store.url} {what}.", _ELSEWHERE)
