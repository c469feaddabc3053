"""Turns: processes of later stages start early, since importing what they need takes longer than many stages.

Each does what needs no other stage's result, then waits for its turn. The supervisor gives turns through a file.
"""

from __future__ import annotations

import os
import sys
import time

from job.errors import ExitCode
from job.run import Run, read_json, write_json

STARTED_EARLY = "JOB_STARTED_EARLY"  # set to 1 in the environment of a process that must wait
_POLL_SECONDS = 0.1


def clear(run: Run) -> None:
    """Forget the turns of an earlier start."""
    run.paths.turns_file.unlink(missing_ok=True)


def give(run: Run, stage: str) -> None:
    """Let a stage start, and the processes that wait for it."""
    write_json(run.paths.turns_file, _given(run) | {stage: time.time()})


def await_turn(run: Run, *stages: str) -> None:
    """Return when one of `stages` has started, or immediately in a process that was not started early.

    The stage's time counts from then on. A process whose parent dies while it waits exits, because the next turn would
    belong to another start's process.
    """
    if os.environ.get(STARTED_EARLY) != "1":
        return
    parent = int(os.environ.get("JOB_PARENT_PID") or os.getppid())
    while not (started := [when for stage, when in _given(run).items() if stage in stages]):
        if os.getppid() != parent:
            sys.exit(ExitCode.TRY_AGAIN)
        time.sleep(_POLL_SECONDS)
    os.environ["JOB_STAGE_BEGAN"] = str(max(started))


def _given(run: Run) -> dict[str, float]:
    """When each stage started, in seconds since the epoch."""
    try:
        return dict(read_json(run.paths.turns_file))
    except FileNotFoundError:
        return {}
