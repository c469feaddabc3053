"""Finds the files of a model or dataset on the Hub, in S3 or on disk, and fetches them."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from job.environment.local_files import DATA_SUFFIXES, local_path
from job.errors import InputError, SettingsError
from job.guard.limits import bounded_json
from job.guard.model_files import check_config
from job.guard.names import UnsafeName, below, checked, refuse_conflicts
from job.hub import hub_errors
from job.storage import Store, open_store

# The files fetched from a model's top-level folder: weights that cannot run code when loaded, and their description.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "LICENSE*", "USE_POLICY*",
)  # fmt: skip
DATA_FILES = (
    "README.md",
    *(f"*{suffix}{packed}" for suffix in DATA_SUFFIXES for packed in ("", ".gz", ".zst", ".bz2")),
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Source:
    """A parsed source setting. `place` is a Hub id, a local path or an S3 URL."""

    variable: str
    kind: Kind
    scheme: Literal["hub", "local", "s3"]
    place: str
    revision: str | None = None

    @classmethod
    def parse(cls, variable: str, kind: Kind, text: str) -> Source:
        """Parse `id`, `id@revision`, a path or `s3://…`. An existing path takes precedence over a Hub id."""
        if text.startswith("s3://"):
            return cls(variable, kind, "s3", text.rstrip("/"))
        path = local_path(text)
        if path is not None:
            if path.exists():
                return cls(variable, kind, "local", str(path))
            raise SettingsError(
                f"{variable}={text!r}: no such file or folder.",
                "Check the path. In a container, it must be mounted.",
            )
        name, _, revision = text.partition("@")
        if not _HUB_ID.match(name) or ".." in name or "--" in name or name.startswith((".", "-")):
            raise SettingsError(
                f"{variable}={text!r} is not a Hub id, a path or s3://bucket/prefix.", "Write it as user/name."
            )
        return cls(variable, kind, "hub", name, revision or None)

    def __str__(self) -> str:
        return self.place + (f"@{self.revision}" if self.revision else "")

    @property
    def described(self) -> str:
        return f"{self.variable}={self}"

    @property
    def patterns(self) -> tuple[str, ...]:
        return MODEL_FILES if self.kind == "model" else DATA_FILES

    def wants(self, name: str) -> bool:
        """Whether the job uses the file `name` of this source, a relative path with slashes."""
        if self.kind == "model" and ("/" in name or name.startswith("consolidated")):
            return False  # weights in the original format, or for another library
        return any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern) for pattern in self.patterns)


def public_name(text: str) -> str:
    """A source's name for publication: a Hub id as it is, or only the last part of a path or S3 URL."""
    path = Path(text).expanduser()
    local = path.exists() or text.startswith(("/", "./", "../", "~", "s3://"))
    return text.rstrip("/").rsplit("/", 1)[-1] if local else text


@dataclass(frozen=True)
class Listing:
    """The content of a source: its commit, if it has one, and each wanted file with its size in bytes."""

    commit: str | None
    files: tuple[tuple[str, int], ...]

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)


def disk_needed(listings: Mapping[Source, Listing]) -> int:
    """Bytes of disk space that a run on these sources needs.

    This covers the fetched files, the merged model (as large as the base model), its published copy, and 10% more for
    checkpoints, tokenized data and logs.
    """
    fetched = sum(listing.total_bytes for source, listing in listings.items() if source.scheme != "local")
    model = sum(listing.total_bytes for source, listing in listings.items() if source.kind == "model")
    return (fetched + 2 * model) * 11 // 10


def look_up(source: Source, commit: str | None = None) -> Listing:
    """List a source without fetching it. `commit` pins a Hub repository to the commit that an earlier start resolved.

    Raises SettingsError if the source does not exist, and InputError if the job cannot use it. A source that names a full
    commit gets that commit, whatever the store says.
    """
    commit = _pinned(source, commit)
    if source.scheme == "hub":
        listing = _look_up_hub(source, commit)
    elif source.scheme == "s3":
        entries = ((key, size) for key, size in open_store(source.place).list("") if source.wants(key))
        listing = Listing(None, tuple(sorted(entries)))
    else:
        listing = Listing(None, tuple(sorted(_local_files(source))))
    names = [name for name, _ in listing.files]
    if source.scheme != "local":
        _refuse_unsafe(source, names)
    _require_usable(source, names)
    return listing


def _refuse_unsafe(source: Source, names: list[str]) -> None:
    """The names become paths below the run's folder, and strangers may have chosen them."""
    try:
        for name in names:
            checked(name)
        refuse_conflicts(names)
    except UnsafeName as error:
        raise InputError(
            f"{source.described} has a file whose name cannot be used: {error}.",
            "Rename it there. Do not use this source if you do not trust it.",
        ) from error


def _pinned(source: Source, recorded: str | None) -> str | None:
    """The commit to use: the user's, if the setting names a full one; else the one that the run's record has.

    Whoever may write the store may write that record.
    """
    if recorded is not None and not _COMMIT.fullmatch(recorded):
        raise SettingsError(
            f"The store's record of this run has no commit for {source.variable}, but {recorded[:60]!r}.",
            "Choose another FT_RUN_ID, and find out who wrote run.json in the store.",
        )
    asked = source.revision if source.revision is not None and _COMMIT.fullmatch(source.revision) else None
    if asked is not None and recorded is not None and asked != recorded:
        raise SettingsError(
            f"{source.described} asks for a commit, and the store's record of this run names another, {recorded}.",
            "Choose another FT_RUN_ID, and find out who wrote run.json in the store.",
        )
    return asked or recorded


def fetch(source: Source, listing: Listing, folder: Path) -> None:
    """Make the wanted files of a source appear below `folder`, as links to files already on disk, or else as copies."""
    if source.scheme == "s3":
        _fetch_s3(open_store(source.place), listing, folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    origin = Path(source.place)
    if source.scheme == "hub":
        names = [name for name, _ in listing.files]
        with hub_errors(source.described):
            origin = Path(
                snapshot_download(
                    source.place,
                    repo_type=source.kind,
                    revision=listing.commit or source.revision,
                    allow_patterns=[glob.escape(name) for name in names],
                )
            )
    for name, _ in listing.files:
        link = folder / name if source.scheme == "local" else below(folder, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(origin if origin.is_file() else origin / name)


def model_config(source: Source) -> dict[str, Any]:
    """The config.json of a model, fetched without the rest."""
    if source.scheme == "s3":
        data = open_store(source.place).get("config.json")
    elif source.scheme == "local":
        data = (Path(source.place) / "config.json").read_bytes()
    else:
        with hub_errors(source.described):
            data = Path(hf_hub_download(source.place, "config.json", revision=source.revision)).read_bytes()
    try:
        config = bounded_json(data, 1 << 20)
    except ValueError as error:
        raise InputError(
            f"{source.described}: its config.json cannot be read: {error}.", "Choose another model."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{source.described}: its config.json is not a JSON object.", "Choose another model.")
    check_config(config)
    return config


def _look_up_hub(source: Source, commit: str | None) -> Listing:
    from huggingface_hub import constants

    with hub_errors(source.described):
        if constants.HF_HUB_OFFLINE:
            cached = Path(
                snapshot_download(
                    source.place, repo_type=source.kind, revision=commit or source.revision, local_files_only=True
                )
            )
            found = (
                (path.relative_to(cached).as_posix(), path.stat().st_size)
                for path in cached.rglob("*")
                if path.is_file()
            )
            return Listing(cached.name, tuple(sorted(item for item in found if source.wants(item[0]))))
        info = HfApi().repo_info(
            source.place, repo_type=source.kind, revision=commit or source.revision, files_metadata=True
        )
    if commit is not None and info.sha != commit:
        raise InputError(
            f"{source.described} answers commit {commit} with {info.sha}.",
            "Check HF_ENDPOINT, and who runs that server.",
        )
    siblings = getattr(info, "siblings", None) or []
    return Listing(
        info.sha, tuple(sorted((item.rfilename, item.size or 0) for item in siblings if source.wants(item.rfilename)))
    )


def _local_files(source: Source) -> list[tuple[str, int]]:
    root = Path(source.place)
    if root.is_file():
        return [(root.name, root.stat().st_size)] if source.wants(root.name) else []
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if source.wants(relative):
                found.append((relative, path.stat().st_size))
    return found


def _fetch_s3(store: Store, listing: Listing, folder: Path) -> None:
    for name, size in listing.files:
        target = below(folder, name)
        if not (target.is_file() and target.stat().st_size == size):  # a file gets its name only when complete
            store.download(name, target)


def _require_usable(source: Source, names: list[str]) -> None:
    if source.kind == "dataset":
        if not any(name.rsplit("/", 1)[-1] != "README.md" for name in names):
            raise InputError(
                f"{source.described} has no data files.",
                f"Provide {', '.join(DATA_SUFFIXES)} files, optionally compressed (.gz, .zst, .bz2).",
            )
        return
    if "config.json" not in names:
        raise InputError(
            f"{source.described} has no config.json.", "Choose the folder or repository of a transformers model."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{source.described} has no safetensors weights.",
            "Convert the model with save_pretrained. Pickled weights (.bin, .pt) are never loaded, because loading them runs code.",
        )
    if not any(name.startswith("tokenizer") for name in names):
        raise InputError(f"{source.described} has no tokenizer.", "Add tokenizer.json or tokenizer.model to it.")
