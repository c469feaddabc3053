"""The run's ledger: which stages count as complete, on this disk and in the store, and what the run began with."""

from __future__ import annotations

import json
from typing import Any

from job.checkpoints import manifest
from job.environment import as_json
from job.errors import InputError, SettingsError
from job.run import Run, now
from job.settings import variable
from job.stages import STAGES, Stage

_BY_NAME = {stage.name: stage for stage in STAGES}


class Ledger:
    """Reads and writes the markers of one run. A marker is written last, so any state that a kill leaves is legal."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._key = f"{run.id}/run.json"

    def begin(self) -> None:
        """Write run.json, or refuse to go on with a run that other settings began."""
        settings = self._run.settings
        try:
            begun = self._record()
        except FileNotFoundError:
            record = {"run_id": self._run.id, "created": now(), "fingerprint": settings.fingerprint("train")}
            self._write(record | {"settings": as_json(settings)})
            return
        before, today = begun.get("settings", {}), as_json(settings)
        differing = [name for name in settings.affecting("train") if before.get(name) != today[name]]
        if differing:
            lines = (f"  - {variable(name)}: was {before.get(name)!r}, is {today[name]!r}" for name in differing)
            raise SettingsError(
                f"Run {self._run.id!r} was begun with other settings:\n" + "\n".join(lines),
                "Set them back to go on with it, or choose another FT_RUN_ID to begin anew.",
            )

    def missing(self) -> set[str]:
        """The requested stages that are not complete, and what those need and is not there."""
        missing: set[str] = set()
        complete: set[str] = set()
        for stage in reversed(STAGES[1:]):
            needed = any(stage.name in _BY_NAME[name].needs for name in missing)
            if not (needed or (stage.name in self._run.settings.stages and not self._superseded(stage, complete))):
                continue
            (complete if self._is_complete(stage) else missing).add(stage.name)
        if missing or self._run.settings.stages == ("preflight",):
            missing.add("preflight")  # the machine may be another one than last time
        return missing

    def bring_back(self, stage: Stage) -> None:
        """Make sure that a kept stage's files lie on this disk."""
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        here = manifest.marked(folder)
        if not stage.kept or (here is not None and here.fingerprint == fingerprint):
            return
        try:
            manifest.restore(self._run.store, self._prefix(stage), folder)
        except manifest.Rejected as reason:
            raise InputError(
                f"The stored result of stage {stage.name} is damaged: {reason}.",
                f"Delete {self._run.store.url}/{self._prefix(stage)} and start again; the last checkpoint is used.",
            ) from reason

    def complete(self, stage: Stage) -> None:
        """Write the marker that makes the stage's files count."""
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        if stage.name == "preflight":
            return
        if stage.kept:
            manifest.commit(self._run.store, self._prefix(stage), folder, fingerprint)
        marker = manifest.mark(folder, fingerprint)
        if stage.name == "download":
            self._refuse_other_content(marker)

    def _is_complete(self, stage: Stage) -> bool:
        """A kept stage counts where the store has it, the others where this disk has them."""
        kept, folder = stage.kept, self._run.paths.stage_dir(stage.name)
        found = manifest.read(self._run.store, self._prefix(stage)) if kept else manifest.marked(folder)
        return found is not None and found.fingerprint == self._run.settings.fingerprint(stage.name)

    def _superseded(self, stage: Stage, complete: set[str]) -> bool:
        """Whether this machine never had the stage's files, and the store has what was made of them elsewhere."""
        used = any(stage.name in _BY_NAME[name].needs for name in complete)
        return used and not stage.kept and not self._run.paths.marker_file(stage.name).exists()

    def _refuse_other_content(self, downloaded: manifest.Manifest) -> None:
        """A file that changed under its name would mix two datasets, or two models, in one run."""
        record = self._record()
        files = {entry.path: entry.sha256 for entry in downloaded.files if entry.path != "sources.json"}
        begun = record.setdefault("files", files)
        differing = [name for name in sorted({*files, *begun}) if files.get(name) != begun.get(name)]
        if differing:
            self._run.paths.marker_file("download").unlink()
            raise SettingsError(
                f"Since run {self._run.id!r} began, its sources have changed: {', '.join(differing)}.",
                "Choose another FT_RUN_ID to train on what is there now.",
            )
        self._write(record)

    def _prefix(self, stage: Stage) -> str:
        return f"{self._run.id}/stages/{stage.name}"

    def _record(self) -> dict[str, Any]:
        return dict(json.loads(self._run.store.get(self._key)))

    def _write(self, record: dict[str, Any]) -> None:
        self._run.store.put(self._key, json.dumps(record, indent=1).encode())
