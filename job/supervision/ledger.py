"""The run's ledger: which stages are complete, on this disk and in the store, and what the run started with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job.checkpoints import manifest
from job.checkpoints.lease import Commit, Lease, LeaseRecord
from job.checkpoints.restore import local_checkpoints
from job.checkpoints.retention import keep_newest_attempt, remove
from job.environment import as_json
from job.environment.local_files import SOURCES, is_local, source_names
from job.errors import SettingsError, TransientError
from job.run import Run, now, read_json, template_content
from job.settings import default_value, variable
from job.stages import STAGES, Stage, stages_of
from job.stages.inputs import digest
from job.storage import Conflict

_BY_NAME = {stage.name: stage for stage in STAGES}
_FOLDERS = {
    "model_name": "model", "dataset_name": "dataset", "eval_dataset_name": "eval_dataset", "adapter_name": "adapter",
}  # fmt: skip
# A checkpoint knows how many processes made it, and refuses another number. How that was said does not matter.
_BY_RESULT = ("nproc_per_node",)


class Ledger:
    """Reads and writes the markers of one run. A marker is written last, so any state that a kill leaves is valid."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stages = stages_of(run.settings)
        self._key = f"{run.id}/run.json"
        self._lease: Lease | None = None
        self._seen: LeaseRecord | None = None
        self._bound: bool | None = None
        self.on_commit: Callable[[], None] = lambda: None  # called when something new is in the store

    def refuse_other_settings(self, *, bound: bool = False) -> None:
        """Raise SettingsError if the run was started with other settings. Writes nothing.

        Until something was trained, another model or dataset, or another template's text, is simply taken. The same local
        files at another place are the same. With `bound`, the sources count in any case: training starts now.
        """
        if bound:
            self._bound = True
        try:
            first = self._record()
        except FileNotFoundError:
            return
        today, names = as_json(self._run.settings), self._run.settings.affecting("train")
        before = {name: first.get("settings", {}).get(name, default_value(name)) for name in names}
        differing = [
            name
            for name in names
            if before[name] != today[name]
            and name not in _BY_RESULT
            and not self._same_content(name, first)
            and not (name == "assistant_only_loss" and (before[name], today[name]) == (False, "auto"))
        ]
        lines = [f"  - {variable(name)}: was {before[name]!r}, is now {today[name]!r}" for name in differing]
        text = template_content(self._run.settings)
        if "chat_template" not in differing and first.get("chat_template_sha256", text) != text and self._is_bound():
            lines.append(f"  - FT_CHAT_TEMPLATE: the text of {today['chat_template']} was another one")
        if lines:
            raise SettingsError(
                f"Run {self._run.id!r} was started with other settings:\n" + "\n".join(lines),
                "Set them back to resume the run, or choose another FT_RUN_ID to start a new one.",
            )

    def begin(self, lease: Lease) -> None:
        """Write run.json if this is the run's first start. From then on the ledger writes under `lease`."""
        self._lease, self._bound = lease, None
        self.refuse_other_settings()
        settings = self._run.settings
        text = template_content(settings)
        record: dict[str, Any] = {
            "run_id": self._run.id,
            "created": now(),
            "fingerprint": self._run.fingerprint("train"),
        }
        record |= {"settings": as_json(settings)} | ({"chat_template_sha256": text} if text is not None else {})
        try:
            self._run.store.put_if_absent(self._key, _to_bytes(record))
        except Conflict:
            first = self._record()
            if not self._is_bound() and _sources(first) != _sources(record):
                self._write(record)  # other sources than at the first start, which trained nothing

    def note(self, facts: dict[str, str]) -> None:
        """Record what the run decided at its first start, unless it is recorded already."""
        record = self._record() if self._lease is not None else {}
        if record and not facts.keys() <= record.get("decided", {}).keys():
            record["decided"] = facts | record.get("decided", {})
            self._write(record)

    def decided(self, fact: str) -> str | None:
        """What the run's first start decided, if it did."""
        try:
            record = self._record()
        except FileNotFoundError:
            return None
        value = record.get("decided", {}).get(fact)
        if fact == "train_on" and value is None and "train_on" not in record.get("settings", {}):
            return "all"  # what versions before this setting learned of conversations
        return value if isinstance(value, str) else None

    def forget_sources(self) -> None:
        """The sources could not be used. Unless something was trained, the next start looks at them again."""
        if self._is_bound() or self._lease is None:
            return
        self._run.paths.marker_file("download").unlink(missing_ok=True)
        record = self._record()
        if any(record.pop(name, None) is not None for name in ("commits", "files")):
            self._write(record)

    def _is_bound(self) -> bool:
        """Whether something was trained before this start, which binds the run to its sources."""
        if self._bound is None:
            self._bound = bool(
                local_checkpoints(self._run)
                or manifest.marked(self._run.paths.stage_dir("train")) is not None
                or self._view().commits(self._run, "checkpoints")
                or self.committed(_BY_NAME["train"])
            )
        return self._bound

    def _same_content(self, name: str, first: dict[str, Any]) -> bool:
        """Whether a source at another place has the recorded files, or nothing depends on the former one yet."""
        if name not in SOURCES:
            return name == "chat_template" and not self._is_bound()
        if not self._is_bound():
            return True
        before, today = first.get("settings", {}).get(name), getattr(self._run.settings, name)
        if not is_local(name, before) or not is_local(name, today):
            return False
        folder = _FOLDERS[name]
        recorded = {
            path.removeprefix(f"{folder}/"): sha256
            for path, sha256 in first.get("files", {}).items()
            if path.startswith(f"{folder}/")
        }
        return bool(recorded) and recorded == _hashes(name, today)

    def missing(self) -> set[str]:
        """The requested stages that are not complete, and the incomplete stages that those need."""
        missing: set[str] = set()
        complete: set[str] = set()
        for stage in reversed(self._stages[1:]):
            needed = any(stage.name in other.needs for other in self._stages if other.name in missing)
            if not (needed or (stage.name in self._run.settings.stages and not self._superseded(stage, complete))):
                continue
            (complete if self.is_complete(stage) else missing).add(stage.name)
        if "download" in missing and "prepare" in complete:
            missing.add("prepare")  # of what was there before; the new download may differ
        if missing or self._run.settings.stages == ("preflight",):
            missing.add("preflight")  # this may be another machine than last time
        return missing

    def bring_back(self, stage: Stage) -> None:
        """Make sure that a kept stage's files are on this disk."""
        folder = self._run.paths.stage_dir(stage.name)
        here = manifest.marked(folder)
        if not stage.kept or (here is not None and self._run.made(stage.name, here.fingerprint)):
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

    def take_shared(self, stage: Stage) -> bool:
        """Bring back a shared stage's stored result, if it was made from exactly the files that are here now."""
        if not stage.shared:
            return False
        for commit in self.committed(stage)[:1]:
            prefix = f"{self._run.id}/{commit.folder}"
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError, manifest.Rejected):
                record = json.loads(self._run.store.get(f"{prefix}/{self._run.paths.data_report_file.name}"))
                if record.get("inputs") == digest(self._run):
                    manifest.restore(self._run.store, prefix, self._run.paths.stage_dir(stage.name))
                    return True
        return False

    def share(self, stage: Stage, go_on: Callable[[], None]) -> None:
        """Store a shared stage's result, which is complete on this disk."""
        folder = self._run.paths.stage_dir(stage.name)
        found = manifest.marked(folder)
        if self._lease is not None and found is not None:
            self._commit(stage, folder, found, go_on, counted=False)  # no work that another start could not repeat

    def adopt(self, stage: Stage) -> bool:
        """Store the result that an earlier start made here, if it did and could not store it. Returns whether it did.

        Its files are compared with their hashes: it is what these settings make, and every byte is as it was written.
        """
        folder = self._run.paths.stage_dir(stage.name)
        here = manifest.marked(folder)
        if not stage.kept or here is None or not self._run.made(stage.name, here.fingerprint) or self.committed(stage):
            return False
        if not here.holds(folder):
            return False
        self._commit(stage, folder, here)
        return True

    def complete(self, stage: Stage) -> None:
        """Write the marker that makes the stage's files count."""
        self.completion(stage)(lambda: None)

    def completion(self, stage: Stage) -> Callable[[Callable[[], None]], None]:
        """The work that is left before the stage's files, as they are now, count.

        It takes a function that it calls repeatedly, and that raises to end the work.
        """
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.fingerprint(stage.name)
        if stage.name == "preflight" or (stage.kept and not self._run.node.leads):
            return lambda go_on: None  # the first node stores what all processes made
        listing = manifest.listed(folder)

        def complete(go_on: Callable[[], None]) -> None:
            known = self._hashed_while_written() if stage.name == "merge" else {}
            found = manifest.Manifest.of(folder, fingerprint, listing, go_on, known)
            go_on()
            if stage.name == "download":
                self._refuse_damaged(found)
            if stage.name == "download" and self._run.node.leads:
                self._refuse_other_content(found)
            manifest.mark(folder, found, go_on)  # a result that the store does not take now is here for the next start
            if stage.kept:
                self._commit(stage, folder, found)

        return complete

    def _hashed_while_written(self) -> dict[str, str]:
        """The hashes of the merged weights, which are not read again for the marker: 13 GB take ten seconds."""
        try:
            return dict(read_json(self._run.paths.merged_hashes_file))
        except FileNotFoundError:
            return {}

    def committed(self, stage: Stage) -> list[Commit]:
        """A kept stage's commits that count, newest attempt first."""
        return self._view().commits(self._run, f"stages/{stage.name}")

    def _commit(
        self,
        stage: Stage,
        folder: Path,
        found: manifest.Manifest,
        go_on: Callable[[], None] = lambda: None,
        *,
        counted: bool = True,
    ) -> None:
        assert self._lease is not None, "only the holder of the lease completes stages"
        commit = Commit(f"stages/{stage.name}", self._lease.record.attempt)
        prefix = f"{self._run.id}/{commit.folder}"
        lease = self._lease

        def may_write() -> None:
            go_on()
            lease.renew()

        manifest.commit(self._run.store, prefix, folder, found.fingerprint, may_write, hashed=found)
        if counted:
            self.on_commit()
        keep_newest_attempt(self._run, self._lease, commit.artefact)

    def published(self) -> dict[str, Any] | None:
        """What the publish stage recorded: where the result is, and what it consists of. None if nothing was published."""
        commits = self.committed(_BY_NAME["publish"])
        if not commits:
            return None
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            name = self._run.paths.published_file.name
            return dict(json.loads(self._run.store.get(f"{self._run.id}/{commits[0].folder}/{name}")))
        return None

    def is_complete(self, stage: Stage) -> bool:
        """A kept stage is complete if the store has it, any other stage if this disk has it.

        What was published is looked at where it was put: it may be gone with the disk, or removed.
        """
        found = self.found(stage)
        if found is None or not self._run.made(stage.name, found.fingerprint):
            return False
        return stage.name != "publish" or self._is_there()

    def _is_there(self) -> bool:
        record = self.published()
        if record is None:
            return False
        from job.hub.publish import still_there  # imports the Hub's client, which takes time

        return still_there(self._run, record)

    def found(self, stage: Stage) -> manifest.Manifest | None:
        """The manifest of a stage's files, whatever settings made them. None if there are none."""
        if not stage.kept:
            # the download's files are links to other people's, who may replace them
            return manifest.marked(self._run.paths.stage_dir(stage.name), replaced=stage.name == "download")
        commits = self.committed(stage)
        return manifest.read(self._run.store, f"{self._run.id}/{commits[0].folder}") if commits else None

    def _superseded(self, stage: Stage, complete: set[str]) -> bool:
        """Whether this machine never had the stage's files, and the store has what was made from them elsewhere."""
        used = any(stage.name in other.needs for other in self._stages if other.name in complete)
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

    def _refuse_damaged(self, downloaded: manifest.Manifest) -> None:
        """Compare the download with the hashes that its source lists. A copy in a cache that differs is thrown away."""
        listed = {
            f"{source.get('folder') or _FOLDERS[variable_name.removeprefix('FT_').lower()]}/{name}": sha256
            for variable_name, source in read_json(self._run.paths.sources_file).items()
            for name, sha256 in source.get("sha256", {}).items()
        }
        damaged = [entry.path for entry in downloaded.files if listed.get(entry.path, entry.sha256) != entry.sha256]
        for path in damaged:
            (self._run.paths.stage_dir("download") / path).resolve().unlink(missing_ok=True)
        if damaged:
            raise TransientError(
                f"{', '.join(damaged)}: the copy in this machine's cache differs from what the Hub lists. It was removed.",
                "Start the job again: it fetches the file again. If that happens twice, the disk is failing.",
            )

    def _compare(self, downloaded: manifest.Manifest, record: dict[str, Any]) -> None:
        files = {entry.path: entry.sha256 for entry in downloaded.files if entry.path != "sources.json"}
        if self._run.node.leads and not self._is_bound():
            record["files"] = files  # nothing was trained on anything else
            return
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


def _sources(record: dict[str, Any]) -> list[Any]:
    """What a run's record says of the sources and the template."""
    settings = record.get("settings", {})
    return [record.get("chat_template_sha256"), *(settings.get(name) for name in (*SOURCES, "chat_template"))]


def _hashes(name: str, text: str) -> dict[str, str]:
    """The SHA-256 of every file of a local source that the job would use, by the names that a download gives them."""
    from job.hub.sources import Source, kind_of, look_up  # imports the Hub's client, which takes time

    kind = kind_of(name)
    names = source_names(name, text)
    found = {}
    for number, part in enumerate(names, 1):
        source = Source.parse(variable(name), kind, part)
        place = Path(source.place)
        prefix = "" if len(names) == 1 else f"{number}/"
        for file, _ in look_up(source).files:
            found[prefix + file] = manifest.sha256(place if place.is_file() else place / file)
    return found


def _to_bytes(record: dict[str, Any]) -> bytes:
    return json.dumps(record, indent=1).encode()
