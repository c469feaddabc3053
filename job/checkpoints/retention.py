"""Which commits stay in the store."""

from __future__ import annotations

from job.checkpoints.lease import Commit, Lease, every_commit, written
from job.checkpoints.manifest import MANIFEST
from job.checkpoints.restore import committed_checkpoints
from job.run import Run

KEPT = 2  # the newest, and one more in case the newest turns out to be damaged


def apply_retention(run: Run, lease: Lease, rejected: frozenset[Commit]) -> list[Commit]:
    """Delete all checkpoints but the newest `KEPT` good ones; returns the commits deleted.

    Good are those that count and that this start did not find damaged. Nothing is deleted before there are enough of
    them, and not without the lease.
    """
    counting = committed_checkpoints(run, lease.record)
    kept = [commit for commit in counting if commit not in rejected][:KEPT]
    if len(kept) < KEPT:
        return []
    mine = lease.record.attempt  # a later attempt's are none of our business, should we be stale and not know it
    old = [commit for commit in every_commit(run, "checkpoints") if commit not in kept and commit.attempt <= mine]
    if old:
        lease.renew()
    for commit in old:
        remove(run, commit)
    return old


def keep_newest_attempt(run: Run, lease: Lease, artefact: str) -> None:
    """Delete what older attempts committed of a stage that this attempt has just committed anew."""
    for commit in every_commit(run, artefact):
        if commit.attempt < lease.record.attempt:
            remove(run, commit)


def sweep(run: Run, lease: Lease) -> int:
    """Remove what killed attempts left unfinished in the store; returns how many pieces there were."""
    objects = list(written(run, ""))
    whole = {commit for commit, _, file in objects if file == MANIFEST}
    orphans = [key for commit, key, _ in objects if commit not in whole and commit.attempt < lease.record.attempt]
    for key in orphans:
        run.store.delete(key)
    return len(orphans) + run.store.sweep(run.id)


def remove(run: Run, commit: Commit) -> None:
    """Delete a commit, the manifest first, so that a deletion cut short leaves nothing that looks whole."""
    prefix = f"{run.id}/{commit.folder}"
    run.store.delete(f"{prefix}/{MANIFEST}")
    for key, _ in list(run.store.list(prefix)):
        run.store.delete(key)
