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

from job import durability
from job.errors import NodeError, PermissionRefused, SettingsError, TransientError
from job.storage import Conflict, is_unfinished, refuse_large

# What a file system without locks or hard links answers (flock(2), link(2)). Trying again changes nothing.
_NEVER = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
_PARTIAL = ".partial-"  # part of the name of a file that is still being written


class LocalStore:
    """Keys are files below `root`. Each is written under a temporary name, synced, renamed, and its folder synced."""

    keeps_versions = False

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def put(self, key: str, data: bytes) -> None:
        with self._errors(key, writing=True):
            durability.replace(self._write_aside(key, data), self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._errors(key, writing=True):
            aside = self._write_aside(key, data)
            try:
                os.link(aside, self._path(key))  # unlike rename, link fails if the name exists
                durability.sync_folder(aside.parent)
            except FileExistsError:
                raise Conflict(key) from None
            except PermissionError as error:
                if error.errno == errno.EPERM:  # link(2): the file system does not support hard links
                    raise OSError(errno.EOPNOTSUPP, "it has no hard links") from error
                raise
            finally:
                aside.unlink(missing_ok=True)

    def put_if_unchanged(self, key: str, data: bytes, version: str) -> str:
        with self._errors(key):
            path = self._path(key)
            durability.make_folder(path.parent)
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

    def upload(self, source: Path, key: str, *, always_in_parts: bool = False) -> None:
        with self._errors(key, writing=True):
            _copy_aside(source, self._path(key))

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            _copy_aside(self._path(key), target)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((key, size) for key, size, _ in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[tuple[str, int, str]]:
        with self._errors(prefix):
            for folder, _, names in os.walk(self._path(prefix)):
                for name in names:
                    path = Path(folder) / name
                    if not is_unfinished(name):
                        with contextlib.suppress(FileNotFoundError):  # deleted since we looked
                            stat = path.stat()
                            key = path.relative_to(self.root).as_posix()
                            yield key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}"

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
            found = self._path(prefix).rglob(f"*{_PARTIAL}*")
            leftovers = [path for path in found if is_unfinished(path.name) and not path.name.endswith("-lock")]
            for path in leftovers:
                path.unlink(missing_ok=True)
            return len(leftovers)

    def age_seconds(self, key: str) -> float:
        """By the clock of the file system, which may be another machine's: that of a file written now."""
        with self._errors(key):
            written = self._path(key).stat().st_mtime
            probe = _aside(self._path(key))
            probe.touch()
            try:
                return probe.stat().st_mtime - written
            finally:
                probe.unlink()

    def _path(self, key: str) -> Path:
        path = self.root / key
        if self.root not in (path, *path.parents) or ".." in path.parts:
            raise ValueError(f"key {key!r} leads out of the store")
        return path

    def _write_aside(self, key: str, data: bytes) -> Path:
        path = self._path(key)
        durability.make_folder(path.parent)
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
            if error.errno in _NEVER:
                raise SettingsError(
                    f"The file system of the store folder {self.root} cannot do what the job needs, for {key!r}: "
                    f"{error.strerror}.",
                    "Set FT_STORE_URL to a folder on a file system with locks, hard links and fsync, or to s3://bucket/prefix. "
                    "Lustre needs its mount option flock; SMB mounts often have no hard links.",
                ) from error
            raise TransientError(
                f"The store folder {self.root} failed on {key!r}: {error}.", "Start the job again."
            ) from error


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")


def _copy_aside(source: Path, target: Path) -> None:
    durability.make_folder(target.parent)
    aside = _aside(target)
    try:
        with source.open("rb") as reader, aside.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 16 * 1024 * 1024)
            writer.flush()
            os.fsync(writer.fileno())
        durability.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
