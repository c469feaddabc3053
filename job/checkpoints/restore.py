"""Finding the newest checkpoint that is whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

from job.checkpoints.manifest import MANIFEST, Rejected, restore
from job.run import Run

_STEP = re.compile(r"checkpoints/step-(\d{8})/" + re.escape(MANIFEST) + "$")


def prefix_of(run_id: str, step: int) -> str:
    """Where the checkpoint of an optimizer step lies in the store."""
    return f"{run_id}/checkpoints/step-{step:08d}"


def committed_steps(run: Run) -> list[int]:
    """The steps that have a manifest in the store, newest first."""
    matches = (_STEP.search(key) for key, _ in run.store.list(f"{run.id}/checkpoints"))
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def restore_newest(run: Run, warn: Callable[[str], None]) -> int | None:
    """Put the newest whole checkpoint where the trainer looks for it; None if there is none to go on from.

    Local leftovers are removed first: what was not committed cannot be trusted to be whole.
    """
    shutil.rmtree(run.paths.checkpoints_dir, ignore_errors=True)
    for step in committed_steps(run):
        try:
            manifest = restore(run.store, prefix_of(run.id, step), run.paths.checkpoints_dir / f"checkpoint-{step}")
        except Rejected as reason:
            warn(f"Checkpoint of step {step} rejected: {reason}. Trying the one before.")
            continue
        if manifest.fingerprint != run.settings.fingerprint("train"):
            warn(f"Checkpoint of step {step} rejected: other settings made it.")
            shutil.rmtree(run.paths.checkpoints_dir, ignore_errors=True)
            continue
        return step
    return None
