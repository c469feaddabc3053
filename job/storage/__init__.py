"""Stores for checkpoints and results. To add one, write a file with these methods and add a line to `SCHEMES`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from job.errors import InputError

LARGEST_SMALL = 64 << 20  # bytes of an object that is read into memory: records, manifests, compiled kernels


_UNFINISHED = re.compile(r"\.partial-([0-9a-f]{8,}(-parts)?|lock)$")


def is_unfinished(name: str) -> bool:
    """Whether a file's name is one that the job gives to files it is still writing."""
    return _UNFINISHED.search(name) is not None


class Conflict(Exception):
    """A conditional write changed nothing, because the object was not in the expected state."""


def refuse_large(key: str, size: int) -> None:
    """Raise InputError for an object that is too large to be one of the job's records."""
    if size > LARGEST_SMALL:
        raise InputError(
            f"The store's {key} has {size:,} bytes, and the job's own records are small.",
            "Find out who wrote it, and remove it or choose another FT_RUN_ID.",
        )


class Store(Protocol):
    """A flat map from keys (`a/b/c`) to bytes.

    Every store raises the same errors: FileNotFoundError only for a missing key, `PermissionRefused` if access is
    denied, `NodeError` if the disk is full, `SettingsError` for an answer that no further try will change, and
    `TransientError` if the network failed after all retries. A store that confuses "absent" with "refused" or
    "unreachable" breaks resume. One that confuses "never" with "not now" makes a scheduler start the job for ever.
    """

    @property
    def url(self) -> str: ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace a small object atomically: a reader sees either the old bytes or the new ones."""

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write a small object. If the key exists, raises `Conflict` and changes nothing."""

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        """Replace a small object and return its new version.

        If it is no longer at `version`, raises `Conflict` and changes nothing.
        """

    def get(self, key: str) -> bytes:
        """A small object. One of more than `LARGEST_SMALL` bytes is not read: raises InputError."""

    def get_with_version(self, key: str) -> tuple[bytes, str]:
        """The object and its version, for `put_if_unchanged`."""

    def upload(self, source: Path, key: str, *, always_in_parts: bool = False) -> None:
        """Copy a local file of any size to the key. A store that sends large files in parts can do so with a small one."""

    def download(self, key: str, target: Path) -> None:
        """Copy the object to a local file. `target` appears only when complete.

        Parts fetched by a killed download are kept next to `target`, and the next download uses them.
        """

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every (key, size in bytes) below `prefix/`, in no particular order."""

    def entries(self, prefix: str) -> Iterator[tuple[str, int, str]]:
        """The same, with a text that differs whenever the object's content was replaced, such as its ETag."""

    def delete(self, key: str) -> None:
        """Remove a key. A missing key is not an error."""

    def trouble(self, since: float) -> str | None:
        """Why the latest failed request failed, if one has since then (`time.monotonic()`) and is being retried."""

    def sweep(self, prefix: str) -> int:
        """Remove leftovers of killed uploads below `prefix/`, which no listing shows. Returns their number."""

    def age_seconds(self, key: str) -> float:
        """How long ago the object was written, by the store's own clock. FileNotFoundError for a missing key."""

    @property
    def keeps_versions(self) -> bool:
        """Whether every write of an object leaves a former version that is paid for, as far as its answers have shown."""


def _local(url: str) -> Store:
    from job.storage.local import LocalStore

    return LocalStore(Path(url.removeprefix("file://")).expanduser())


def _s3(url: str) -> Store:
    from job.storage.s3 import S3Store  # boto3 takes half a second to import, so import it only when used

    return S3Store(url)


SCHEMES: dict[str, Callable[[str], Store]] = {"": _local, "file": _local, "s3": _s3}


def open_store(url: str) -> Store:
    """The store that `url` names. This touches neither disk nor network."""
    return SCHEMES[scheme_of(url)](url)


def scheme_of(url: str) -> str:
    """What is before `://`; empty for a plain path."""
    return url.partition("://")[0].lower() if "://" in url else ""
