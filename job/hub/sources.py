"""Finds the files of a model or dataset on the Hub, in S3 or on disk, and fetches them."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from job.environment.local_files import DATA_SUFFIXES, PACKED_SUFFIXES, local_path
from job.errors import InputError, SettingsError, TransientError
from job.guard.limits import bounded_json
from job.guard.model_files import check_config
from job.guard.names import UnsafeName, below, checked, refuse_conflicts
from job.hub import hub_errors, is_outage, patiently
from job.hub.cards import terms, terms_in_folder
from job.hub.git import blob_id
from job.report.events import message
from job.run import read_json, write_json
from job.storage import Store, is_unfinished, open_store

# The files fetched from a model's top-level folder: weights that cannot run code when loaded, and their description.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DATA_FILES = (
    "README.md",
    *(f"*{suffix}{packed}" for suffix in DATA_SUFFIXES for packed in ("", *PACKED_SUFFIXES)),
)

_HASHED_AT_ONCE = 64 << 20  # bytes of a file whose hash is compared at once; larger ones' when they are hashed anyway
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
Kind = Literal["model", "dataset", "adapter"]


@dataclass(frozen=True)
class Source:
    """A parsed source setting. `place` is a Hub id, a local path or an S3 URL."""

    variable: str
    kind: Kind
    scheme: Literal["hub", "local", "s3"]
    place: str
    revision: str | None = None
    weights: bool = True  # without them, a model is its configuration and its tokenizer

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
        return {"model": MODEL_FILES, "adapter": ADAPTER_FILES, "dataset": DATA_FILES}[self.kind]

    @property
    def repo_type(self) -> str:
        """What the Hub calls it."""
        return "dataset" if self.kind == "dataset" else "model"

    def wants(self, name: str) -> bool:
        """Whether the job uses the file `name` of this source, a relative path with slashes."""
        if self.kind == "model" and not self.weights and ".safetensors" in name:
            return False
        if self.kind == "adapter":  # this job publishes one in a folder of that name
            return name.removeprefix("adapter/") in ADAPTER_FILES
        if self.kind == "model" and ("/" in name or name.startswith("consolidated")):
            return False  # weights in the original format, or for another library
        last = name.rsplit("/", 1)[-1]
        if self.kind == "dataset" and last != "README.md":
            last = last.lower()
        return any(fnmatch.fnmatch(last, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Listing:
    """The content of a source: its commit, if it has one, and each wanted file with its size in bytes.

    `versions` says of a file what changes whenever its content does, where the source says so: S3's ETag, or on the Hub
    `sha256:…` for large files and `git:…`, the id of a git blob, for small ones. `card` is what its card says of license
    and language.
    """

    commit: str | None
    files: tuple[tuple[str, int], ...]
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    card: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.files)


def kind_of(setting: str) -> Kind:
    """What a source setting names."""
    kinds: dict[str, Kind] = {"model_name": "model", "adapter_name": "adapter"}
    return kinds.get(setting, "dataset")


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
        entries = sorted(entry for entry in open_store(source.place).entries("") if source.wants(entry[0]))
        listing = Listing(
            None, tuple((key, size) for key, size, _ in entries), {key: version for key, _, version in entries}
        )
    else:
        listing = Listing(None, tuple(sorted(_local_files(source))), card=terms_in_folder(Path(source.place)))
    names = [name for name, _ in listing.files]
    if source.scheme != "local":
        _refuse_unsafe(source, names)
    else:
        _refuse_undecodable(source, names)
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


def _refuse_undecodable(source: Source, names: list[str]) -> None:
    """Records of the run, and Arrow, hold text. A file's name on disk may be any bytes."""
    for name in (source.place, *names):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{source.variable}: the name of the file {os.fsencode(name)!r} is not UTF-8.",
                "Rename it, and start again.",
            ) from None


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
    """Make the wanted files of a source appear below `folder`, as links to files already on disk, or else as copies.

    Files that an earlier start left there are used if they are the listed ones by version, and removed otherwise.
    """
    if source.scheme == "s3":
        _fetch_s3(open_store(source.place), listing, folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    origin = Path(source.place)
    if source.scheme == "hub":
        origin = _fetch_hub(source, listing)
    for name, _ in listing.files:
        link = folder / name if source.scheme == "local" else below(folder, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(origin if origin.is_file() else origin / name)


def _fetch_hub(source: Source, listing: Listing) -> Path:
    """The folder of the Hub's cache with the listed files. Copies there that differ from the list are fetched again."""
    for last in (False, True):
        with hub_errors(source.described):
            origin = Path(
                patiently(
                    lambda: snapshot_download(
                        source.place,
                        repo_type=source.repo_type,
                        revision=listing.commit or source.revision,
                        allow_patterns=[glob.escape(name) for name, _ in listing.files],
                    )
                )
            )
        damaged = [
            name for name, size in listing.files if not _is_listed(origin / name, size, listing.versions.get(name))
        ]
        if not damaged:
            return origin
        for name in damaged:
            (origin / name).resolve().unlink(missing_ok=True)  # the blob that the name is a link to
            (origin / name).unlink(missing_ok=True)
        if last or constants.HF_HUB_OFFLINE:
            break
        message(
            f"{source.described}: the cached copy of {', '.join(damaged)} is damaged. Fetching it again.", "warning"
        )
    raise TransientError(
        f"{source.described}: {', '.join(damaged)} differs from what the Hub lists. The damaged copy was removed from the cache.",
        "Start the job again with the network. If this happens again, this machine's disk damages data: use another one.",
    )


def listed_sha256(listing: Listing, folder: Path) -> dict[str, str]:
    """The SHA-256 that a source lists for its files, or that the Hub's cache has them under."""
    found = {}
    for name, _ in listing.files:
        version = listing.versions.get(name) or _cached_version(folder / name)
        if version is not None and version.startswith("sha256:"):
            found[name] = version.removeprefix("sha256:")
    return found


def _is_listed(file: Path, size: int, version: str | None) -> bool:
    """Whether a file has the listed size and content. Large files' content is compared later, when they are hashed."""
    if not file.is_file() or (size and file.stat().st_size != size):
        return False
    kind, _, digest = (version or _cached_version(file) or "").partition(":")
    if kind == "sha256" and file.stat().st_size <= _HASHED_AT_ONCE:
        return hashlib.sha256(file.read_bytes()).hexdigest() == digest
    if kind == "git" and file.stat().st_size <= _HASHED_AT_ONCE:
        data = file.read_bytes()
        return blob_id(data) == digest
    return True


def _cached_version(file: Path) -> str | None:
    """The version by which the Hub's cache names the content of a file: its ETag, a SHA-256 or the id of a git blob."""
    name = file.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return f"sha256:{name}"
    return f"git:{name}" if _COMMIT.fullmatch(name) else None


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
    with hub_errors(source.described):
        if constants.HF_HUB_OFFLINE:
            return _look_up_cache(source, commit)
        try:
            info = patiently(
                lambda: HfApi().repo_info(
                    source.place, repo_type=source.repo_type, revision=commit or source.revision, files_metadata=True
                )
            )
        except Exception as error:
            if commit is None or not is_outage(error):
                raise
            try:  # all that this run needs may be here
                return _look_up_cache(source, commit)
            except LocalEntryNotFoundError:
                raise error from None
    if commit is not None and info.sha != commit:
        raise InputError(
            f"{source.described} answers commit {commit} with {info.sha}.",
            "Check HF_ENDPOINT, and who runs that server.",
        )
    siblings = [item for item in getattr(info, "siblings", None) or [] if source.wants(item.rfilename)]
    files = tuple(sorted((item.rfilename, item.size or 0) for item in siblings))
    versions = {item.rfilename: version for item in siblings if (version := _version_of(item))}
    card = getattr(info, "card_data", None)
    return Listing(info.sha, files, versions, terms(card.to_dict() if card is not None else {}))


def _look_up_cache(source: Source, commit: str | None) -> Listing:
    """What the Hub's cache on this disk has of a repository."""
    cached = Path(
        snapshot_download(
            source.place, repo_type=source.repo_type, revision=commit or source.revision, local_files_only=True
        )
    )
    found = ((path.relative_to(cached).as_posix(), path) for path in cached.rglob("*") if path.is_file())
    wanted = {name: path for name, path in found if source.wants(name)}
    files = tuple(sorted((name, path.stat().st_size) for name, path in wanted.items()))
    return Listing(
        cached.name, files, {name: version for name, path in wanted.items() if (version := _cached_version(path))}
    )


def _version_of(sibling: Any) -> str | None:
    lfs = sibling.lfs
    digest = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if digest:
        return f"sha256:{digest}"
    return f"git:{sibling.blob_id}" if sibling.blob_id else None


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
    """Copy the listed objects. A record in the run's folder says which version of each is there, durably."""
    record_file = folder.parent.with_name(f"{folder.name}.versions.json")
    try:
        here: dict[str, str] = dict(read_json(record_file))
    except (OSError, ValueError):
        here = {}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        name = path.relative_to(folder).as_posix()
        known = here.get(name) is not None and here.get(name) == listing.versions.get(name)
        if not known and not is_unfinished(name):
            path.unlink()
    for name, size in listing.files:
        target = below(folder, name)
        if target.is_file() and target.stat().st_size == size:
            continue
        store.download(name, target)
        if target.stat().st_size != size:
            raise TransientError(f"{store.url}/{name} changed while it was being fetched.", "Start the job again.")
        here[name] = listing.versions[name]
        write_json(record_file, here)


def _require_usable(source: Source, names: list[str]) -> None:
    if source.kind == "dataset":
        if not any(name.rsplit("/", 1)[-1] != "README.md" for name in names):
            raise InputError(
                f"{source.described} has no data files.",
                f"Provide {', '.join(DATA_SUFFIXES)} files, optionally compressed ({', '.join(PACKED_SUFFIXES)}).",
            )
        return
    if source.kind == "adapter":
        folders = {name.rpartition("/")[0] for name in names if name.endswith(ADAPTER_FILES[0])}
        if not any((f"{folder}/{ADAPTER_FILES[1]}".lstrip("/")) in names for folder in folders):
            raise InputError(
                f"{source.described} has no adapter_config.json with adapter_model.safetensors.",
                "Name a folder or repository that peft can load. Pickled weights (.bin) are never loaded.",
            )
        return
    if "config.json" not in names:
        raise InputError(
            f"{source.described} has no config.json.", "Choose the folder or repository of a transformers model."
        )
    if source.weights and not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{source.described} has no safetensors weights.",
            "Convert the model with save_pretrained. Pickled weights (.bin, .pt) are never loaded, because loading them runs code.",
        )
    if not any(name.startswith("tokenizer") for name in names):
        raise InputError(f"{source.described} has no tokenizer.", "Add tokenizer.json or tokenizer.model to it.")
