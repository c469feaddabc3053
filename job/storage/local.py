"""A store in a folder: the default, also for mounted volumes and shared file systems."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from job.errors import NodeError, PermissionRefused, TransientError
from job.storage import Conflict, refuse_large

_PARTIAL = ".partial-"  # part of the name of a file that is still being written


class LocalStore:
    """Keys are files below `root`. Each file is written under a temporary name, synced with fsync, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key, writing=True):
            os.replace(self._write_aside(key, data), self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._errors(key, writing=True):
            aside = self._write_aside(key, data)
            try:
                os.link(aside, self._path(key))  # unlike rename, link fails if the name exists
            except FileExistsError:
                raise Conflict(key) from None
            finally:
                aside.unlink(missing_ok=True)

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        with self._errors(key):
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f"{path.name}{_PARTIAL}lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when its holder dies
                try:
                    found = self.get_with_version(key)[1]
                except FileNotFoundError:
                    found = ""
                if found != version:
                    raise Conflict(key)
                self.put(key, data)
                return _version(data)

    def get_with_version(self, key: str) -> tuple[bytes, str]:
        data = self.get(key)
        return data, _version(data)

    def get(self, key: str) -> bytes:
        with self._errors(key):
            path = self._path(key)
            refuse_large(key, path.stat().st_size)
            return path.read_bytes()

    def upload(self, source: Path, key: str) -> None:
        with self._errors(key, writing=True):
            _copy_aside(source, self._path(key))

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            _copy_aside(self._path(key), target)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self._errors(prefix):
            for folder, _, names in os.walk(self._path(prefix)):
                for name in names:
                    path = Path(folder) / name
                    if _PARTIAL not in name:
                        with contextlib.suppress(FileNotFoundError):  # deleted since we looked
                            yield path.relative_to(self.root).as_posix(), path.stat().st_size

    def delete(self, key: str) -> None:
        with self._errors(key):
            path = self._path(key)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # folders are not objects, so leave no empty ones behind
                for folder in itertools.takewhile(lambda folder: folder != self.root, path.parents):
                    folder.rmdir()  # stops at the first that is not empty

    def trouble(self, since: float) -> str | None:
        return None

    def sweep(self, prefix: str) -> int:
        with self._errors(prefix):
            leftovers = [path for path in self._path(prefix).rglob(f"*{_PARTIAL}*") if not path.name.endswith("-lock")]
            for path in leftovers:
                path.unlink(missing_ok=True)
            return len(leftovers)

    def _path(self, key: str) -> Path:
        path = self.root / key
        if self.root not in (path, *path.parents) or ".." in path.parts:
            raise ValueError(f"key {key!r} leads out of the store")
        return path

    def _write_aside(self, key: str, data: bytes) -> Path:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        with aside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        return aside

    @contextlib.contextmanager
    def _errors(self, key: str, writing: bool = False) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if not writing:
                raise
            raise TransientError(  # another attempt swept the file away meanwhile, or the folder itself is gone
                f"{key!r} could not be written to the store folder {self.root}: {error}.", "Start the job again."
            ) from error
        except PermissionError as error:
            raise PermissionRefused(
                f"The store folder {self.root} refuses access to {key!r}: {error.strerror}.",
                "Set FT_STORE_URL to a folder that this user can write to, or fix its permissions.",
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NodeError(
                    f"No space left for {key!r} in the store folder {self.root}.",
                    "Free some space there, or set FT_STORE_URL to a larger volume. Committed work is intact.",
                ) from error
            raise TransientError(
                f"The store folder {self.root} failed on {key!r}: {error}.", "Start the job again."
            ) from error


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")


def _copy_aside(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        with source.open("rb") as reader, aside.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 * 1024 * 1024)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
