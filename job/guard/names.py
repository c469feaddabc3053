"""Names from outside that become paths here: files of the Hub and of S3, archive entries, manifests, dataset cards.

Whoever may write those names must not choose what is written or read outside of the folder they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 1024  # bytes; what file systems and S3 allow


class UnsafeName(ValueError):
    """A name that cannot be the relative path of a file below a folder. The message says why."""


def below(root: Path, name: str) -> Path:
    """The path of the file `name` below `root`. Raises UnsafeName if it would not be below it, or not be a plain name."""
    checked(name)
    return root.joinpath(*name.split("/"))


def checked(name: str) -> str:
    """`name`, if it is a relative path with slashes that means the same on every system; else raises UnsafeName."""
    reason = _objection(name)
    if reason is not None:
        raise UnsafeName(f"{name[:120]!r} {reason}")
    return name


def refuse_conflicts(names: Iterable[str]) -> None:
    """Raise UnsafeName if a name is listed twice, or is a file and at the same time a folder of another."""
    files: set[str] = set()
    folders: set[str] = set()
    for name in names:
        if name in files:
            raise UnsafeName(f"{name[:120]!r} is listed twice")
        files.add(name)
        parts = name.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    if both := files & folders:
        raise UnsafeName(f"{min(both)[:120]!r} is a file and a folder")


def _objection(name: str) -> str | None:
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid text"
    if any(ord(character) < 32 or 127 <= ord(character) < 160 or character in "\u2028\u2029" for character in name):
        return "has a control character"
    if "\\" in name or ":" in name.split("/")[0] or name.startswith("~"):
        return "is a path of another kind"
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:
        return "is not a plain relative path"
    if len(encoded) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in parts):
        return "is too long"
    return None
