"""Finds and restores the newest intact checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.lease import Commit, LeaseRecord
from job.checkpoints.manifest import MANIFEST, Rejected, marked, restore
from job.run import Run

_FOLDER = "checkpoints"
_CHECKPOINT = re.compile(rf"{_FOLDER}/step-[0-9]{{8,}}")


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a start resumes from (None: the beginning), and the commits that it rejected.

    `unstored` is its folder if the checkpoint is on this disk only, since the store did not take it in time.
    """

    commit: Commit | None
    rejected: frozenset[Commit] = frozenset()
    unstored: Path | None = None

    @property
    def step(self) -> int | None:
        if self.unstored is not None:
            return local_step(self.unstored)
        return step_of(self.commit) if self.commit is not None else None


def checkpoint_at(step: int, attempt: int) -> Commit:
    """The commit of an attempt's checkpoint at an optimizer step."""
    return Commit(f"{_FOLDER}/step-{step:08d}", attempt)


def step_of(commit: Commit) -> int:
    """The optimizer step after which a checkpoint was written."""
    return step_of_folder(commit.folder)


def step_of_folder(folder: str) -> int:
    """The same, from its folder in the store, such as `checkpoints/step-00000120/attempt-0003`."""
    return int(folder.split("/")[1].removeprefix("step-"))


def committed_checkpoints(run: Run, lease: LeaseRecord) -> list[Commit]:
    """The checkpoints that count, newest first. What people have put beside them is not looked at."""
    return [commit for commit in lease.commits(run, _FOLDER) if is_checkpoint(commit)]


def is_checkpoint(commit: Commit) -> bool:
    """Whether a commit is named as this job names checkpoints."""
    return _CHECKPOINT.fullmatch(commit.artefact) is not None


def local_step(folder: Path) -> int:
    """The step of a local checkpoint, from its folder's name, such as `checkpoint-120`."""
    return int(folder.name.rpartition("-")[2])


def local_checkpoints(run: Run) -> list[Path]:
    """The marked checkpoints on this disk that these settings made, newest first. Their bytes are still to be compared."""
    folders = [path.parent for path in run.paths.checkpoints_dir.glob(f"checkpoint-*/{MANIFEST}")]
    whole = [folder for folder in folders if folder.name.rpartition("-")[2].isdigit() and _ours(run, folder)]
    return sorted(whole, key=local_step, reverse=True)


def _ours(run: Run, folder: Path) -> bool:
    manifest = marked(folder)
    return manifest is not None and run.made("train", manifest.fingerprint)


def restore_newest(run: Run, lease: LeaseRecord, warn: Callable[[str], None]) -> Restored:
    """Put the newest intact checkpoint where the trainer looks for it.

    One on this disk is used if it is newer than all in the store, and every byte is as it was when it was written. Other
    local files are removed, because they cannot be trusted. Only the parts of an interrupted restore are kept, and
    verified again.
    """
    folder = run.paths.checkpoints_dir
    stored = committed_checkpoints(run, lease)
    newest = step_of(stored[0]) if stored else 0
    for local in local_checkpoints(run):
        if local_step(local) > newest:
            manifest = marked(local)
            if manifest is not None and manifest.holds(local):
                clear(folder, but=local.name)
                return Restored(None, unstored=local)
            warn(f"The checkpoint of step {local_step(local)} on this disk is damaged. Trying the one before it.")
    clear(folder, but="*.partial-*")
    rejected: set[Commit] = set()
    for commit in stored:
        step = step_of(commit)
        try:
            manifest = restore(run.store, f"{run.id}/{commit.folder}", folder / f"checkpoint-{step}")
        except Rejected as reason:
            warn(f"Checkpoint of step {step} rejected: {reason}. Trying the one before it.")
            rejected.add(commit)
            continue
        if not run.made("train", manifest.fingerprint):
            warn(f"Checkpoint of step {step} rejected: it was made with other settings.")
            rejected.add(commit)
            continue
        clear(folder, but=f"checkpoint-{step}")
        return Restored(commit, frozenset(rejected))
    clear(folder, but="")
    return Restored(None, frozenset(rejected))


def clear(folder: Path, but: str) -> None:
    """Remove everything in `folder` that does not match the pattern `but`."""
    kept = set(folder.glob(but)) if but else set()
    for path in folder.glob("*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
