"""Shows what the store has of a run."""

from __future__ import annotations

import json
import time

from job.checkpoints.lease import LeaseRecord
from job.checkpoints.restore import committed_checkpoints, step_of
from job.errors import SettingsError
from job.run import Run
from job.stages import stages_of
from job.supervision.ledger import Ledger


def print_status(run: Run) -> None:
    """Print when the run started, which stages are complete, and which checkpoints are committed."""
    try:
        record = json.loads(run.store.get(f"{run.id}/run.json"))
    except FileNotFoundError:
        raise SettingsError(
            f"The store {run.store.url} has no run {run.id!r}.",
            "Set FT_RUN_ID and FT_STORE_URL as they were for the run. Without FT_RUN_ID, all other settings must be the same too.",
        ) from None
    ledger = Ledger(run)
    print(f"run {run.id}, started {record['created']}, store {run.store.url}")
    for stage in stages_of(run.settings):
        if stage.name == "preflight":
            continue
        found = ledger.found(stage)
        if found is None:
            print(f"  {stage.name:<10} not complete" + ("" if stage.kept else " on this machine"))
        else:
            stale = "" if run.made(stage.name, found.fingerprint) else ", with other settings"
            gone = not stale and stage.name == "publish" and not ledger.is_complete(stage)
            print(
                f"  {stage.name:<10} complete since {found.created}{stale or (', but no longer where it was put' if gone else '')}"
            )
    lease = LeaseRecord.read(run)
    steps = [step_of(commit) for commit in committed_checkpoints(run, lease)]
    print("  checkpoints committed: " + (", ".join(f"step {step}" for step in steps) or "none"))
    if lease.attempt:
        at_work = (
            "ended" if lease.released else f"on {lease.host}, last heard from {time.time() - lease.renewed:.0f} s ago"
        )
        print(f"  attempt {lease.attempt}: {at_work}")
