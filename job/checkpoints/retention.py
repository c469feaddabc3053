"""Which committed checkpoints stay."""

from __future__ import annotations

from job.checkpoints.manifest import MANIFEST
from job.checkpoints.restore import committed_steps, prefix_of
from job.run import Run

KEPT = 2  # the newest, and one more in case the newest turns out to be damaged


def apply_retention(run: Run, newest: int) -> list[int]:
    """Delete all but the newest `KEPT` committed checkpoints up to step `newest`; returns the steps deleted.

    `newest` was just committed and verified by this run. Anything beyond it was rejected at the start, and must not
    push good ones out.

    The manifest goes first, so that a deletion cut short leaves no checkpoint that looks whole.
    """
    old = [step for step in committed_steps(run) if step <= newest][KEPT:]
    for step in old:
        prefix = prefix_of(run.id, step)
        run.store.delete(f"{prefix}/{MANIFEST}")
        for key, _ in list(run.store.list(prefix)):
            run.store.delete(key)
    return old
