"""The run's ledger: which stages are complete, on this disk and in the store, and what the run started with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.checkpoints import manifest
from job.checkpoints.lease import Commit, Lease, LeaseRecord
from job.checkpoints.retention import keep_newest_attempt, remove
from job.environment import as_json
from job.errors import SettingsError, TransientError
from job.run import Run, now, read_json
from job.settings import default_value, variable
from job.stages import STAGES, Stage
from job.storage import Conflict

_BY_NAME = {stage.name: stage for stage in STAGES}


class Ledger:
    """Reads and writes the markers of one run. A marker is written last, so any state that a kill leaves is valid."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._key = f"{run.id}/run.json"
        self._lease: Lease | None = None
        self._seen: LeaseRecord | None = None

    def refuse_other_settings(self) -> None:
        """Raise SettingsError if the run was started with other settings. Writes nothing."""
        try:
            first = self._record()
        except FileNotFoundError:
            return
        today, names = as_json(self._run.settings), self._run.settings.affecting("train")
        before = {name: first.get("settings", {}).get(name, default_value(name)) for name in names}
        differing = [name for name in names if before[name] != today[name]]
        if differing:
            lines = (f"  - {variable(name)}: was {before[name]!r}, is now {today[name]!r}" for name in differing)
            raise SettingsError(
                f"Run {self._run.id!r} was started with other settings:\n" + "\n".join(lines),
                "Set them back to resume the run, or choose another FT_RUN_ID to start a new one.",
            )

    def begin(self, lease: Lease) -> None:
        """Write run.json if this is the run's first start. From then on the ledger writes under `lease`."""
        self._lease = lease
        self.refuse_other_settings()
        settings = self._run.settings
        record = {"run_id": self._run.id, "created": now(), "fingerprint": settings.fingerprint("train")}
        with contextlib.suppress(Conflict):
            self._run.store.put_if_absent(self._key, _to_bytes(record | {"settings": as_json(settings)}))

    def missing(self) -> set[str]:
        """The requested stages that are not complete, and the incomplete stages that those need."""
        missing: set[str] = set()
        complete: set[str] = set()
        for stage in reversed(STAGES[1:]):
            needed = any(stage.name in _BY_NAME[name].needs for name in missing)
            if not (needed or (stage.name in self._run.settings.stages and not self._superseded(stage, complete))):
                continue
            (complete if self.is_complete(stage) else missing).add(stage.name)
        if missing or self._run.settings.stages == ("preflight",):
            missing.add("preflight")  # this may be another machine than last time
        return missing

    def bring_back(self, stage: Stage) -> None:
        """Make sure that a kept stage's files are on this disk."""
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        here = manifest.marked(folder)
        if not stage.kept or (here is not None and here.fingerprint == fingerprint):
            return
        commits = self.committed(stage)
        if not commits:
            raise TransientError(f"The store does not list the result of stage {stage.name}.", "Start the job again.")
        commit = commits[0]
        prefix = f"{self._run.id}/{commit.folder}"
        try:
            manifest.restore(self._run.store, prefix, folder)
        except manifest.Rejected as reason:
            remove(self._run, commit)
            raise TransientError(
                f"The stored result of stage {stage.name} is damaged: {reason}. It was removed.",
                "Start the job again: it makes the result again, and training resumes from the last checkpoint.",
            ) from reason

    def complete(self, stage: Stage) -> None:
        """Write the marker that makes the stage's files count."""
        self.completion(stage)(lambda: None)

    def completion(self, stage: Stage) -> Callable[[Callable[[], None]], None]:
        """The work that is left before the stage's files, as they are now, count.

        It takes a function that it calls repeatedly, and that raises to end the work.
        """
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        if stage.name == "preflight" or (stage.kept and not self._run.node.leads):
            return lambda go_on: None  # the first node stores what all processes made
        listing = manifest.listed(folder)

        def complete(go_on: Callable[[], None]) -> None:
            if stage.kept:
                self._commit(stage, folder, fingerprint)
            found = manifest.Manifest.of(folder, fingerprint, listing, go_on)
            go_on()
            if stage.name == "download" and self._run.node.leads:
                self._refuse_other_content(found)
            manifest.mark(folder, found)

        return complete

    def committed(self, stage: Stage) -> list[Commit]:
        """A kept stage's commits that count, newest attempt first."""
        return self._view().commits(self._run, f"stages/{stage.name}")

    def _commit(self, stage: Stage, folder: Path, fingerprint: str) -> None:
        assert self._lease is not None, "only the holder of the lease completes stages"
        commit = Commit(f"stages/{stage.name}", self._lease.record.attempt)
        manifest.commit(self._run.store, f"{self._run.id}/{commit.folder}", folder, fingerprint, self._lease.renew)
        keep_newest_attempt(self._run, self._lease, commit.artefact)

    def published_at(self) -> str | None:
        """The destination that the publish stage recorded. None if nothing was published."""
        commits = self.committed(_BY_NAME["publish"])
        if not commits:
            return None
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            name = self._run.paths.published_file.name
            record = json.loads(self._run.store.get(f"{self._run.id}/{commits[0].folder}/{name}"))
            return str(record.get("page") or record["destination"])
        return None

    def is_complete(self, stage: Stage) -> bool:
        """A kept stage is complete if the store has it, any other stage if this disk has it."""
        found = self.found(stage)
        return found is not None and found.fingerprint == self._run.settings.fingerprint(stage.name)

    def found(self, stage: Stage) -> manifest.Manifest | None:
        """The manifest of a stage's files, whatever settings made them. None if there are none."""
        if not stage.kept:
            return manifest.marked(self._run.paths.stage_dir(stage.name))
        commits = self.committed(stage)
        return manifest.read(self._run.store, f"{self._run.id}/{commits[0].folder}") if commits else None

    def _superseded(self, stage: Stage, complete: set[str]) -> bool:
        """Whether this machine never had the stage's files, and the store has what was made from them elsewhere."""
        used = any(stage.name in _BY_NAME[name].needs for name in complete)
        return used and not stage.kept and not self._run.paths.marker_file(stage.name).exists()

    def _refuse_other_content(self, downloaded: manifest.Manifest) -> None:
        """Compare the download with the run's record, and add the sources' commits to the record.

        A file that changed under its name would mix two datasets, or two models, in one run.
        """
        record = self._record()
        self._compare(downloaded, record)
        sources = read_json(self._run.paths.sources_file)
        record["commits"] = {name: source["commit"] for name, source in sources.items() if source["commit"]}
        self._write(record)

    def refuse_other_sources(self) -> None:
        """Raise if this node, not the first, has downloaded other files than the first, as far as those are known."""
        downloaded = manifest.marked(self._run.paths.stage_dir("download"))
        with contextlib.suppress(FileNotFoundError):
            record = self._record()
            if downloaded is not None and "files" in record:
                self._compare(downloaded, record)

    def _compare(self, downloaded: manifest.Manifest, record: dict[str, Any]) -> None:
        files = {entry.path: entry.sha256 for entry in downloaded.files if entry.path != "sources.json"}
        first = record.setdefault("files", files)
        differing = [name for name in sorted({*files, *first}) if files.get(name) != first.get(name)]
        if differing:
            self._run.paths.marker_file("download").unlink(missing_ok=True)
            raise SettingsError(
                f"Since run {self._run.id!r} started, its sources have changed: {', '.join(differing)}.",
                "Choose another FT_RUN_ID to train on what is there now.",
            )

    def _view(self) -> LeaseRecord:
        """What counts, by our own lease or else by its current holder's."""
        if self._lease is not None:
            return self._lease.record
        self._seen = self._seen or LeaseRecord.read(self._run)
        return self._seen

    def _record(self) -> dict[str, Any]:
        return dict(json.loads(self._run.store.get(self._key)))

    def _write(self, record: dict[str, Any]) -> None:
        self._run.store.put(self._key, _to_bytes(record))


def _to_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()
