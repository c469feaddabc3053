"""Decides which commits stay in the store, and deletes the others."""

from __future__ import annotations

from job.checkpoints.lease import Commit, Lease, every_commit, written
from job.checkpoints.manifest import MANIFEST
from job.checkpoints.restore import committed_checkpoints, is_checkpoint
from job.run import Run

KEPT = 2  # the newest, and one more in case the newest is damaged


def apply_retention(run: Run, lease: Lease, rejected: frozenset[Commit]) -> list[Commit]:
    """Delete all checkpoints except the newest `KEPT` good ones, and return the deleted commits.

    A checkpoint is good if it counts and this start did not reject it. Nothing is deleted until there are `KEPT` good
    ones, nor without the lease.
    """
    counting = committed_checkpoints(run, lease.record)
    kept = [commit for commit in counting if commit not in rejected][:KEPT]
    if len(kept) < KEPT:
        return []
    mine = lease.record.attempt  # never touch a later attempt's commits: we may be stale without knowing it
    old = [
        commit
        for commit in every_commit(run, "checkpoints")
        if is_checkpoint(commit) and commit not in kept and commit.attempt <= mine
    ]
    if old:
        lease.renew()
    for commit in old:
        remove(run, commit)
    return old


def keep_newest_attempt(run: Run, lease: Lease, artefact: str) -> None:
    """Delete older attempts' commits of an artefact that this attempt has just committed again."""
    for commit in every_commit(run, artefact):
        if commit.attempt < lease.record.attempt:
            remove(run, commit)


def sweep(run: Run, lease: Lease) -> int:
    """Remove what killed attempts left unfinished in the store, and return the number of pieces."""
    objects = list(written(run, ""))
    whole = {commit for commit, _, file in objects if file == MANIFEST}
    orphans = [key for commit, key, _ in objects if commit not in whole and commit.attempt < lease.record.attempt]
    for key in orphans:
        run.store.delete(key)
    return len(orphans) + run.store.sweep(run.id)


def remove(run: Run, commit: Commit) -> None:
    """Delete a commit, manifest first, so that an interrupted deletion leaves nothing that looks complete."""
    prefix = f"{run.id}/{commit.folder}"
    run.store.delete(f"{prefix}/{MANIFEST}")
    for key, _ in list(run.store.list(prefix)):
        run.store.delete(key)
