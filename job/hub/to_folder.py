"""Publishes to a folder: the new model takes the place of the old one in one step, which no kill and no reader can halve.

A volume that is mounted at the folder itself cannot be exchanged, nor can a folder whose parent is not writable. Their
files are replaced one by one, and the record that names them first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from job import durability
from job.errors import PermissionRefused, SettingsError, TransientError
from job.hub.ownership import RECORD, Update, hashes, is_there, refuse_others, remember, update
from job.run import Run

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # renameat2(2)
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system, or a kernel, without such renames


class Folder:
    """A folder on this machine. If another run's model is there, `otherwise` is used, or it is an error."""

    def __init__(self, run: Run, folder: Path, otherwise: Path | None = None) -> None:
        self._run, self._folder, self._otherwise = run, folder, otherwise

    def __str__(self) -> str:
        return str(self._folder)

    def check(self) -> None:
        self._choose()
        nearest = next(parent for parent in (self._folder, *self._folder.parents) if parent.exists())
        if not os.access(nearest, os.W_OK):
            raise PermissionRefused(
                f"FT_PUBLISH_TO: {nearest} is not writable.", "Choose a folder that this user can write to."
            )

    def publish(self, repository: Path) -> dict[str, Any]:
        fixed = is_fixed(self._folder)
        with only_one(self._folder if fixed else self._folder.parent):
            restore_interrupted(self._folder)
            self._choose()
            record = self._folder / RECORD
            former = record.read_bytes() if record.is_file() else None
            change = self._change(repository, former)
            remember(repository, former)
            own = sizes(repository)
            if fixed or is_fixed(self._folder):
                replace_files(repository, self._folder, change)
            else:
                publish_folder(repository, self._folder, change)
        return {"destination": str(self._folder), "sizes": own}

    def holds(self, record: dict[str, Any]) -> bool:
        with contextlib.suppress(OSError):
            return is_there(record.get("sizes") or {RECORD: 0}, sizes(self._folder))
        return False

    def _change(self, repository: Path, record: bytes | None) -> Update:
        return update(
            str(self._folder),
            record,
            _names(self._folder),
            _names(repository),
            lambda name: hashes((self._folder / name).read_bytes()) if (self._folder / name).is_file() else (),
        )

    def _choose(self) -> None:
        """Decide between the folder and `otherwise`. Raises SettingsError if neither is free, or this run's."""
        try:
            _refuse_others(self._run, self._folder)
        except SettingsError:
            if self._otherwise is None:
                raise
            _refuse_others(self._run, self._otherwise)
            self._folder = self._otherwise


def sizes(folder: Path) -> dict[str, int]:
    """The size of every file below `folder`."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


_NO_CHANGE = Update(frozenset(), frozenset())


def publish_folder(source: Path, target: Path, change: Update = _NO_CHANGE) -> None:
    """Move `source` to `target`, durably. Whoever looks, or wherever a kill strikes, finds the old model or the new one.

    What else is in `target` stays there, except what `change` says.
    """
    durability.make_folder(target.parent)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    _let_everyone_read(source)
    shutil.move(source, partial)  # a rename on the same volume, otherwise a copy
    durability.sync_tree(partial)
    new, old = set(_names(partial)), set(_names(target, whole=True))
    _carry(target, partial, (old - new - change.removed) | change.kept)
    try:
        while not _swap(partial, target):
            pass
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        replace_files(partial, target, change)  # mounted there, as `is_fixed` could not know
        return
    durability.sync_folder(target.parent)
    _carry(partial, target, set(_names(partial)) - old - new)  # what somebody wrote there meanwhile
    shutil.rmtree(partial, ignore_errors=True)  # the old model


def replace_files(source: Path, target: Path, change: Update = _NO_CHANGE) -> None:
    """Move the files of `source` into the existing `target`, each in one step, and remove what `change` says.

    The record comes first: from then on the folder is this run's, and a start after a kill does the rest.
    """
    partial = target / f".partial-{uuid.uuid4().hex[:8]}"
    _let_everyone_read(source)
    shutil.move(source, partial)
    durability.sync_tree(partial)
    for name in change.removed:
        (target / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds others' files
            (target / name).parent.rmdir()
    wanted = sorted(set(_names(partial)) - change.kept, key=lambda name: (name != RECORD, name))
    for name in wanted:
        _make_parents(partial, target, name)
        os.replace(partial / name, target / name)
    for folder in {target, *((target / name).parent for name in wanted)}:
        durability.sync_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _carry(old: Path, new: Path, names: set[str]) -> None:
    """Let `new` hold the files of others, too."""
    for name in names:
        if (new / name).is_symlink() or (new / name).is_file():
            (new / name).unlink()
        _make_parents(old, new, name)
        if (old / name).is_dir() and not (old / name).is_symlink():
            (new / name).mkdir(exist_ok=True)
            shutil.copymode(old / name, new / name)
            continue
        with contextlib.suppress(FileNotFoundError):  # another publication was faster, on a file system without locks
            durability.link(old / name, new / name)
    for folder in {(new / name).parent for name in names}:
        durability.sync_folder(folder)


def _make_parents(source: Path, target: Path, name: str) -> None:
    """Make the folders of a file in `target`, with the permissions that they have in `source`."""
    for folder in reversed(Path(name).parents[:-1]):
        if not (target / folder).is_dir():
            (target / folder).mkdir()
            shutil.copymode(source / folder, target / folder)


def is_fixed(folder: Path) -> bool:
    """Whether the folder cannot be renamed: a volume is mounted there, or its parent is not writable."""
    if not folder.is_dir():
        return False
    return folder.resolve() in _mounted() or not os.access(folder.parent, os.W_OK | os.X_OK)


def _mounted() -> set[Path]:
    """Where something is mounted, by proc(5). A folder that is mounted from the same volume looks like any other."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return {Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4])) for line in lines}
    return set()


def restore_interrupted(target: Path) -> None:
    """Finish what a kill left of a publication: bring the old model back if it was moved aside, and remove leftovers."""
    formers = sorted(target.parent.glob(f"{target.name}.former-*"), key=lambda path: path.stat().st_mtime)
    if formers and not target.exists():
        os.replace(formers.pop(), target)
    for leftover in (*formers, *target.parent.glob(f"{target.name}.partial-*"), *target.glob(".partial-*")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Let one publication at a time work in `folder`. On a file system without locks, several may."""
    durability.make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_others(run: Run, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"FT_PUBLISH_TO: {folder} is a file.", "Set FT_PUBLISH_TO to a folder.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if not name.startswith(".partial-")}  # a killed start's
    record = folder / RECORD
    refuse_others(
        run, str(folder), names, record.read_bytes() if record.is_file() else None, bare=frozenset({"lost+found"})
    )


def _names(folder: Path, *, whole: bool = False) -> Iterable[str]:
    """Everything below a folder that is no folder, or an empty one, by its path there. Links are not followed.

    With `whole`, raises OSError if some of it cannot be seen.
    """

    def failed(error: OSError) -> None:
        if whole and not isinstance(error, FileNotFoundError):
            raise error

    for parent, folders, files in os.walk(folder, onerror=failed):
        for name in (*files, *(name for name in folders if _is_leaf(Path(parent) / name))):
            yield (Path(parent) / name).relative_to(folder).as_posix()


def _is_leaf(folder: Path) -> bool:
    try:
        return folder.is_symlink() or not any(folder.iterdir())
    except OSError:
        return False


def _let_everyone_read(folder: Path) -> None:
    """What is published is for others, whatever this process keeps to itself."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _swap(new: Path, target: Path) -> bool:
    """Give `target` the content of `new`, which then holds the former content, if any. False if another was faster."""
    try:
        if target.exists():
            _rename(new, target, _RENAME_EXCHANGE)
        else:
            _rename(new, target, _RENAME_NOREPLACE)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if new.exists():
            return False
        raise TransientError(
            f"{new} was removed while it was published.", "Run only one job per folder, then start again."
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        _swap_in_two_steps(new, target)
    return True


def _swap_in_two_steps(new: Path, target: Path) -> None:
    """On a file system that cannot exchange two folders. `restore_interrupted` undoes a kill in between."""
    former = target.with_name(f"{target.name}.former-{uuid.uuid4().hex[:8]}")
    had = target.exists()
    if had:
        os.replace(target, former)
    try:
        os.replace(new, target)
    except BaseException:
        if had:
            os.replace(former, target)
        raise
    if had:
        os.replace(former, new)


def _rename(source: Path, target: Path, how: int) -> None:
    """renameat2(2), for which Python has no name. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), how) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
