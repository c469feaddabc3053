"""Finds and restores the newest intact checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from job.checkpoints.lease import Commit, LeaseRecord
from job.checkpoints.manifest import Rejected, restore
from job.run import Run

_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a start resumes from (None: the beginning), and the commits that it rejected."""

    commit: Commit | None
    rejected: frozenset[Commit] = frozenset()

    @property
    def step(self) -> int | None:
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
    """The checkpoints that count, newest first."""
    return lease.commits(run, _FOLDER)


def restore_newest(run: Run, lease: LeaseRecord, warn: Callable[[str], None]) -> Restored:
    """Put the newest intact checkpoint where the trainer looks for it.

    Local leftovers are removed first, because uncommitted files cannot be trusted. Only the parts of an interrupted
    restore are kept, and verified again.
    """
    folder = run.paths.checkpoints_dir
    clear(folder, but="*.partial-*")
    rejected: set[Commit] = set()
    for commit in committed_checkpoints(run, lease):
        step = step_of(commit)
        try:
            manifest = restore(run.store, f"{run.id}/{commit.folder}", folder / f"checkpoint-{step}")
        except Rejected as reason:
            warn(f"Checkpoint of step {step} rejected: {reason}. Trying the one before it.")
            rejected.add(commit)
            continue
        if manifest.fingerprint != run.settings.fingerprint("train"):
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
