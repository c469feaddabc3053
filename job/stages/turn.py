"""Turns: processes of later stages are started early, since importing what they need takes longer than many a stage.

Each does what needs no other stage's result, and then waits for its turn, which the supervisor gives by a file.
"""

from __future__ import annotations

import os
import sys
import time

from job.errors import ExitCode
from job.run import Run, read_json, write_json

STARTED_EARLY = "JOB_STARTED_EARLY"  # set in the environment of a process that is to wait
_POLL_SECONDS = 0.1


def clear(run: Run) -> None:
    """No stage of this start has had its turn."""
    run.paths.turns_file.unlink(missing_ok=True)


def give(run: Run, stage: str) -> None:
    """Let a stage begin, and those that wait for it."""
    write_json(run.paths.turns_file, _given(run) | {stage: time.time()})


def await_turn(run: Run, *stages: str) -> None:
    """Return when one of `stages` has begun; at once in a process that was not started early. The stage's time counts from
    then on. Whoever's parent goes meanwhile ends: the next turn would be given to another start's process."""
    if os.environ.get(STARTED_EARLY) != "1":
        return
    parent = int(os.environ.get("JOB_PARENT_PID") or os.getppid())
    while not (begun := [when for stage, when in _given(run).items() if stage in stages]):
        if os.getppid() != parent:
            sys.exit(ExitCode.TRY_AGAIN)
        time.sleep(_POLL_SECONDS)
    os.environ["JOB_STAGE_BEGAN"] = str(max(begun))


def _given(run: Run) -> dict[str, float]:
    """When each stage began, in seconds since the epoch."""
    try:
        return dict(read_json(run.paths.turns_file))
    except FileNotFoundError:
        return {}
