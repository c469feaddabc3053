"""The local files that settings name: whether they exist and can be read, found before any process is started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from job.environment.mixture import parts_of
from job.errors import InputError
from job.guard.model_files import check_config, read
from job.settings import Settings, variable

DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".arrow", ".feather", ".txt")
PACKED_SUFFIXES = (".gz", ".bz2", ".zst", ".xz")
SOURCES = ("model_name", "dataset_name", "eval_dataset_name", "adapter_name")


def local_path(text: str) -> Path | None:
    """The path that a source setting means, whether it exists or not; None for a Hub id or an S3 URL."""
    if text.startswith("s3://"):
        return None
    path = Path(text).expanduser()
    name = path.name.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    is_path = text.startswith(("/", "./", "../", "~")) or name.endswith(DATA_SUFFIXES) or path.exists()
    return path.absolute() if is_path else None


def public_name(text: str) -> str:
    """A source's name for publication: a Hub id as it is, or only the last part of a path or S3 URL."""
    path = Path(text).expanduser()
    local = path.exists() or text.startswith(("/", "./", "../", "~", "s3://"))
    return text.rstrip("/").rsplit("/", 1)[-1] if local else text


def missing_paths(settings: Settings) -> list[str]:
    """One line for each file that a setting names and that does not exist or cannot be read."""
    return [
        f"{variable(name)}={text!r}: {problem}. Check the path. In a container, it must be mounted."
        for name, text, path in _named(settings)
        if (problem := _unreadable(path)) is not None
    ]


def unusable_files(settings: Settings) -> list[str]:
    """One line for each local model or dataset that no training could use: files without rows, a broken config.json."""
    problems = []
    for name, text, path in _named(settings):
        if _unreadable(path) is None:
            problem = _broken_config(path) if name == "model_name" else _without_rows(path)
            problems += [f"{variable(name)}={text!r}: {problem}"] if problem is not None else []
    return problems


def source_names(setting: str, text: str | None) -> list[str]:
    """The sources that the text of a source setting names: several for a mixture of datasets."""
    if text is None:
        return []
    return [part.name for part in parts_of(text)] if setting == "dataset_name" else [text]


def is_local(setting: str, text: str | None) -> bool:
    """Whether all sources that a setting names are files or folders of this machine."""
    names = source_names(setting, text)
    return bool(names) and all(local_path(name) is not None for name in names)


def _named(settings: Settings) -> Iterator[tuple[str, str, Path]]:
    for name in SOURCES:
        for text in source_names(name, getattr(settings, name)):
            if (path := local_path(text)) is not None:
                yield name, text, path


def _unreadable(path: Path) -> str | None:
    if not path.exists():
        return "no such file or folder"
    needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
    return None if os.access(path, needed) else "this user may not read it"


def _broken_config(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        return None  # the listing says what is missing
    try:
        check_config(read(file))
    except InputError as error:
        return error.message
    return None


def _without_rows(path: Path) -> str | None:
    """Text files that hold nothing but white space have no rows. Other formats are left to the loader."""
    if not path.is_file():
        return None
    if path.suffix not in (".jsonl", ".json", ".csv"):
        return "has no rows: the file is empty" if path.stat().st_size == 0 else None
    with path.open("rb") as stream:
        return None if any(line.strip() for line in stream) else "has no rows: the file is empty"
