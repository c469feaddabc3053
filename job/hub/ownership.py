"""Whose a published model is: its record names the run and its files. No run replaces what another one, or a person, wrote.

Publishing again removes what this run wrote the last time and no longer publishes. People's own files stay, and so do
files of this run that people have changed since, such as a model card.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.errors import SettingsError
from job.hub.git import blob_id
from job.report.events import message
from job.run import Run, write_json

RECORD = "finetune_run.json"  # a file in everything we publish
# What a place may hold before anybody has published there
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".gguf")
# What an older version of this job, whose record lists no files, has certainly written
_OLD = re.compile(
    r"(adapter/|fp8/)?(model[\w-]*\.safetensors(\.index\.json)?|adapter_model\.safetensors|adapter_config\.json)"
)
_ALWAYS_OURS = ("adapter_config.json",)  # loaders take the whole folder for an adapter if one is left
_LARGE = 1 << 20  # bytes of a text that nobody edits
EMPTY = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE", "lost+found", ".DS_Store"})


def refuse_others(run: Run, place: str, names: set[str], record: bytes | None, *, bare: frozenset[str] = EMPTY) -> None:
    """Raise SettingsError if `place` holds files, and its record does not say that this run published them.

    `names` are its files, and `bare` those of an empty place.
    """
    if not names - bare:
        return
    if record is None:
        raise SettingsError(
            f"FT_PUBLISH_TO: {place} contains files that this job did not write.",
            "Choose a new place, or empty that one.",
        )
    if (owner := run_of(record)) != run.id:
        raise SettingsError(
            f"FT_PUBLISH_TO: {place} holds the model of another run, {owner!r}.",
            "Choose a new place, remove that model, or set FT_RUN_ID to that run's if it is the same one.",
        )


def run_of(record: bytes) -> str | None:
    """The run that wrote a record. None if it is not one."""
    try:
        return str(json.loads(record)["run_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def list_files(repository: Path) -> None:
    """Write into the record which files are published, with the hashes of those that people may want to change."""
    files = {
        path.relative_to(repository).as_posix(): hashes(path.read_bytes()) if _may_be_edited(path) else []
        for path in sorted(repository.rglob("*"))
        if path.is_file() and path != repository / RECORD
    }
    record = json.loads((repository / RECORD).read_text(encoding="utf-8"))
    write_json(repository / RECORD, {**record, "files": files})


def remember(repository: Path, record: bytes | None) -> None:
    """Add the hashes of what this run published before to the record, for places that are not replaced in one step.

    If a kill strikes between two files, the next start must know both kinds as this run's.
    """
    own = json.loads((repository / RECORD).read_text(encoding="utf-8"))
    former = _listed(record) or {}
    files = {name: sorted({*new, *former.get(name, ())}) if new else [] for name, new in own.get("files", {}).items()}
    if "files" in own:
        write_json(repository / RECORD, {**own, "files": files})


def _may_be_edited(path: Path) -> bool:
    return not path.name.endswith(_WEIGHTS) and path.stat().st_size <= _LARGE


def hashes(content: bytes) -> list[str]:
    """The names that S3 manifests and the Hub give to a file's content."""
    return [hashlib.sha256(content).hexdigest(), blob_id(content)]


@dataclass(frozen=True)
class Update:
    """What publishing again does to a place: it leaves the `kept` files as they are, and removes the `removed` ones."""

    kept: frozenset[str]
    removed: frozenset[str]


def update(
    place: str,
    record: bytes | None,
    found: Iterable[str],
    wanted: Iterable[str],
    content: Callable[[str], Iterable[str]],
) -> Update:
    """How `place`, which holds the files `found` and maybe a `record` of this run, changes to hold those `wanted`.

    `content` gives the hashes of a file that is there, as far as they are known. Raises SettingsError if somebody else
    has put a file where one is to be written.
    """
    found, wanted = set(found), {*wanted, RECORD}
    listed = _listed(record)
    if listed is None:  # of an older version of this job, or nothing was published yet
        return Update(frozenset(), frozenset(name for name in found - wanted if _OLD.fullmatch(name)))
    theirs = sorted((found & wanted) - set(listed) - {RECORD} - EMPTY)
    if theirs:
        raise SettingsError(
            f"FT_PUBLISH_TO: {place} contains {theirs[0]}, which this job did not write, and has to.",
            "Rename that file, or choose a new place.",
        )

    def is_changed(name: str) -> bool:
        return bool(listed[name]) and not set(listed[name]) & set(content(name))

    kept = {name for name in found & wanted & set(listed) if is_changed(name)}
    removed = {
        name
        for name in (found & set(listed)) - wanted
        if name.rpartition("/")[2] in _ALWAYS_OURS or not is_changed(name)
    }
    if kept:
        message(
            f"Left {', '.join(sorted(kept))} in {place} as changed by others since this run published there.", "warning"
        )
    return Update(frozenset(kept), frozenset(removed))


def _listed(record: bytes | None) -> dict[str, list[str]] | None:
    """The files that a record names, with their hashes. None if it names none."""
    try:
        files: Any = json.loads(record or b"null")["files"]
        return {str(name): [str(one) for one in listed] for name, listed in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_there(sizes: dict[str, int], found: dict[str, int]) -> bool:
    """Whether everything that was published is still there, with the weights whole. Texts may have been edited."""
    return all(name in found and (not name.endswith(_WEIGHTS) or found[name] == size) for name, size in sizes.items())
