"""Where checkpoints and results survive. A new store is one file with these methods and one line in `_SCHEMES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit


class Conflict(Exception):
    """A conditional write found another state than the one it was conditional on; it changed nothing."""


class Store(Protocol):
    """A flat map from keys (`a/b/c`) to bytes.

    Errors, the same for every store: FileNotFoundError for a key that is not there, and for nothing else;
    `PermissionRefused` where access is denied; `NodeError` where the disk is full; `TransientError` where the network
    failed past its retries. A store that cannot tell "absent" from "refused" or "unreachable" breaks resume.
    """

    @property
    def url(self) -> str: ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace a small object; a reader sees the old bytes or the new ones."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write a small object; raises `Conflict`, and changes nothing, if the key exists."""

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        """Replace a small object; raises `Conflict`, and changes nothing, unless it is still at `version`.

        Returns its new version.
        """

    def get(self, key: str) -> bytes: ...

    def get_with_version(self, key: str) -> tuple[bytes, str]:
        """The object and a name for exactly this state of it, for `put_if_unchanged`."""

    def upload(self, source: Path, key: str) -> None:
        """Copy a local file of any size to the key."""

    def download(self, key: str, target: Path) -> None:
        """Copy the object to a local file; `target` appears only when complete.

        What a killed download had fetched is kept beside `target` and used by the next one.
        """

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every (key, size in bytes) below `prefix/`, in no particular order."""

    def delete(self, key: str) -> None:
        """Remove a key; no error if it is not there."""

    def sweep(self, prefix: str) -> int:
        """Remove what killed uploads left below `prefix/` and no listing shows; returns how many there were."""


def _local(url: str) -> Store:
    from job.storage.local import LocalStore

    return LocalStore(Path(url.removeprefix("file://")))


def _s3(url: str) -> Store:
    from job.storage.s3 import S3Store  # boto3 takes half a second to import; only those who use it wait

    return S3Store(url)


_SCHEMES: dict[str, Callable[[str], Store]] = {"": _local, "file": _local, "s3": _s3}


def open_store(url: str) -> Store:
    """The store that `url` names; touches neither disk nor network yet."""
    scheme = urlsplit(url).scheme if "://" in url else ""
    return _SCHEMES[scheme](url)
