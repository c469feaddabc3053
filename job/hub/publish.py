"""Publishes a finished model to a Hub repository or a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from job.checkpoints.manifest import sha256
from job.errors import PermissionRefused, SettingsError, TransientError
from job.hub import hub_errors
from job.run import Run

RECORD = "finetune_run.json"  # a file in everything we publish, so that we never overwrite other people's folders


@dataclass(frozen=True)
class Destination:
    """The target of FT_PUBLISH_TO: a Hub repository id or a folder."""

    hub_id: str | None
    folder: Path | None

    @classmethod
    def of(cls, run: Run) -> Destination:
        target = run.settings.publish_to
        if target is None:
            return cls(None, run.paths.output_dir / "published" / run.settings.new_model_name)
        if target.startswith("hf://"):
            return cls(target.removeprefix("hf://").strip("/"), None)
        return cls(None, Path(target).expanduser().absolute())

    def __str__(self) -> str:
        return f"hf://{self.hub_id}" if self.hub_id else str(self.folder)


def check_destination(run: Run) -> None:
    """Check now that publishing will be allowed, before hours of training."""
    destination = Destination.of(run)
    if destination.hub_id is not None:
        _create_repository(run, destination.hub_id)
        return
    folder = destination.folder
    assert folder is not None
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"FT_PUBLISH_TO: {folder} is a file.", "Set FT_PUBLISH_TO to a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise SettingsError(
            f"FT_PUBLISH_TO: {folder} contains files that this job did not write.",
            "Choose a new folder, or empty that one.",
        )
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(nearest, os.W_OK):
        raise PermissionRefused(
            f"FT_PUBLISH_TO: {nearest} is not writable.", "Choose a folder that this user can write to."
        )


def _let_everyone_read(folder: Path) -> None:
    """What is published is for others, whatever this process keeps to itself."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def publish_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`. A reader never sees a mix of the old model and the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, former = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.former")
    for leftover in (partial, former):
        shutil.rmtree(leftover, ignore_errors=True)
    _let_everyone_read(source)
    shutil.move(source, partial)  # a rename on the same volume, otherwise a copy
    if target.exists():
        os.replace(target, former)
    os.replace(partial, target)
    shutil.rmtree(former, ignore_errors=True)


def publish_to_hub(run: Run, source: Path, hub_id: str) -> tuple[str, str]:
    """Push `source` in one commit, then compare the Hub's hashes with the local files.

    Returns (repository id with its namespace, commit). The same commit removes weights of an earlier push that are no
    longer part of the model. Raises TransientError if the Hub's bytes differ from those sent.
    """
    repository = _create_repository(run, hub_id)
    files = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    api = HfApi()
    with hub_errors(f"FT_PUBLISH_TO=hf://{repository}"):
        stale = [
            name
            for name in api.list_repo_files(repository)
            if name.endswith((".safetensors", ".safetensors.index.json")) and name not in files
        ]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(path_in_repo=name) for name in stale
        ]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        commit = api.create_commit(repository, operations, commit_message=f"Fine-tuned model of run {run.id}")
        listed = {
            item.path: item
            for item in api.list_repo_tree(repository, recursive=True, revision=commit.oid)
            if hasattr(item, "blob_id")
        }
    wrong = [name for name, path in files.items() if name not in listed or not _same_bytes(path, listed[name])]
    if wrong:
        raise TransientError(
            f"The bytes on the Hub differ from those sent for {', '.join(wrong)}.",
            "Start the job again to push once more.",
        )
    return repository, commit.oid


def _same_bytes(path: Path, listed: object) -> bool:
    lfs = getattr(listed, "lfs", None)
    if lfs is not None:
        return bool(lfs.sha256 == sha256(path))
    data = path.read_bytes()  # git's blob id: the SHA-1 of a header and the bytes
    return bool(
        getattr(listed, "blob_id", None)
        == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    )


def _create_repository(run: Run, hub_id: str) -> str:
    with hub_errors(f"FT_PUBLISH_TO=hf://{hub_id}"):
        return HfApi().create_repo(hub_id, private=run.settings.hub_private, exist_ok=True).repo_id
