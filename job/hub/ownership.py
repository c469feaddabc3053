"""Whose a published model is: its record names the run, and no run replaces what another one, or a person, published."""

from __future__ import annotations

import json

from job.errors import SettingsError
from job.run import Run

RECORD = "finetune_run.json"  # a file in everything we publish
# What a place may hold before anybody has published there
EMPTY = frozenset({".gitattributes", ".gitignore", "README.md", "LICENSE", "lost+found", ".DS_Store"})


def refuse_others(run: Run, place: str, names: set[str], record: bytes | None, *, bare: frozenset[str] = EMPTY) -> None:
    """Raise SettingsError if `place` holds files, and its record does not say that this run published them.

    `names` are its files, and `bare` those of an empty place.
    """
    if not names - bare:
        return
    if record is None:
        raise SettingsError(
            f"FT_PUBLISH_TO: {place} contains files that this job did not write.",
            "Choose a new place, or empty that one.",
        )
    if (owner := run_of(record)) != run.id:
        raise SettingsError(
            f"FT_PUBLISH_TO: {place} holds the model of another run, {owner!r}.",
            "Choose a new place, remove that model, or set FT_RUN_ID to that run's if it is the same one.",
        )


def run_of(record: bytes) -> str | None:
    """The run that wrote a record. None if it is not one."""
    try:
        return str(json.loads(record)["run_id"])
    except (ValueError, KeyError, TypeError):
        return None
