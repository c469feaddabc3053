"""Makes files survive a power cut: their bytes first, then the names of their folders, before anything vouches for them.

A file that was written, closed and renamed may still be empty after the power comes back: fsync(2) of the file makes its
bytes durable, and fsync of its folder makes its name durable. Whatever vouches for files (a marker, a manifest, a
record of what was fetched) is written after `sync_tree` or by `replace`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# File systems on which a folder cannot be synced (some FUSE and SMB mounts) answer so. Their files still can.
_FOLDER_CANNOT = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def sync_file(path: Path) -> None:
    """Make the bytes of a file durable. Raises OSError if the disk failed to write them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_CANNOT:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. The names of the new ones are durable."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def replace(aside: Path, target: Path) -> None:
    """Rename a file whose bytes are durable, durably. `aside` is in the same folder as `target`."""
    os.replace(aside, target)
    sync_folder(target.parent)


def sync_tree(folder: Path, go_on: Callable[[], None] = lambda: None) -> None:
    """Make everything below `folder` durable, and the name of `folder` itself.

    Links are followed, and what they lead to is synced with the folder that holds it: models and datasets are links into
    a cache. `go_on` is called between files and may raise to abort.
    """
    folders: dict[Path, None] = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            go_on()
            path = Path(parent) / name
            with contextlib.suppress(FileNotFoundError):  # a lock or a bar's file that is gone again
                sync_file(path)
                if path.is_symlink():
                    folders[path.resolve().parent] = None
        folders[Path(parent)] = None
    for path in (*reversed(folders), folder.absolute().parent):
        sync_folder(path)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has no such links: 13 GB need not be there twice."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
