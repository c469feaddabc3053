"""The parent of everything: starts stages, passes stop requests on, stores what they make, decides the exit code.

It imports neither torch nor transformers: signals, uploads and exit codes must not depend on a library that may crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from job.checkpoints import manifest
from job.checkpoints.restore import committed_steps, restore_newest
from job.checkpoints.syncer import Syncer
from job.environment import as_json
from job.errors import ExitCode, InputError, SettingsError, Stopped
from job.process import StageProcess
from job.report.console import Console, StageRecord
from job.run import Run, now, write_json
from job.settings import variable
from job.stages import STAGES, Stage

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS, _LAST_WORDS_SECONDS = 2, 3
_BY_NAME = {stage.name: stage for stage in STAGES}


class Supervisor:
    """One start of one run. `supervise()` returns when every requested stage is complete, or raises why not."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._records: list[StageRecord] = []
        self._process: StageProcess | None = None
        self._stop_deadline: float | None = None
        self._syncer: Syncer | None = None

    def supervise(self) -> None:
        """Run what is missing of the requested stages, in order; the closing table is printed in every case."""
        closing = f"Run {self._run.id} is not complete."
        try:
            with self._stop_signals():
                self._run.paths.run_dir.mkdir(parents=True, exist_ok=True)
                self._run.paths.stop_file.unlink(missing_ok=True)
                self._claim()
                did = self._run_missing()
            closing = f"Run {self._run.id} is {did}."
        finally:
            if self._records:
                self._console.summary(self._records, closing)

    def _run_missing(self) -> str:
        missing = self._missing()
        for stage in STAGES:
            if stage.name in missing:
                self._run_stage(stage)
            elif stage.name in self._run.settings.stages:
                self._records.append(StageRecord(stage.name, "skipped"))
        return "complete" if missing else "complete already; nothing to do"

    # -- what is to be done ---------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Write run.json, or refuse to go on with a run that other settings began."""
        key, settings = f"{self._run.id}/run.json", self._run.settings
        record = {
            "run_id": self._run.id,
            "created": now(),
            "fingerprint": settings.fingerprint("train"),
            "settings": as_json(settings),
        }
        try:
            begun = json.loads(self._run.store.get(key))
        except FileNotFoundError:
            self._run.store.put(key, json.dumps(record, indent=1).encode())
            return
        before, today = begun.get("settings", {}), as_json(settings)
        differing = [name for name in settings.affecting("train") if before.get(name) != today[name]]
        if differing:
            listing = "\n".join(
                f"  - {variable(name)}: was {before.get(name)!r}, is {today[name]!r}" for name in differing
            )
            raise SettingsError(
                f"Run {self._run.id!r} was begun with other settings:\n{listing}",
                "Set them back to go on with it, or choose another FT_RUN_ID to begin anew.",
            )

    def _missing(self) -> set[str]:
        """The requested stages that are not complete, and what those need and is not there."""
        missing: set[str] = set()
        complete: set[str] = set()
        for stage in reversed(STAGES[1:]):
            needed = any(stage.name in _BY_NAME[name].needs for name in missing)
            requested = stage.name in self._run.settings.stages
            if not stage.kept and any(stage.name in _BY_NAME[name].needs for name in complete):
                requested = False  # what was made of its files is in the store, wherever the files are
            if (needed or requested) and self._is_complete(stage):
                complete.add(stage.name)
            elif needed or requested:
                missing.add(stage.name)
        if missing or self._run.settings.stages == ("preflight",):
            missing.add("preflight")  # the machine may be another one than last time
        return missing

    def _is_complete(self, stage: Stage) -> bool:
        """A kept stage counts where the store has it, the others where this disk has them."""
        fingerprint = self._run.settings.fingerprint(stage.name)
        found = (
            manifest.read(self._run.store, self._prefix(stage))
            if stage.kept
            else manifest.marked(self._run.paths.stage_dir(stage.name))
        )
        return found is not None and found.fingerprint == fingerprint

    def _prefix(self, stage: Stage) -> str:
        return f"{self._run.id}/stages/{stage.name}"

    # -- one stage --------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        self._refuse_if_stopping()
        self._console.stage_started(stage.name)
        record = StageRecord(stage.name, "failed")
        self._records.append(record)
        started = time.monotonic()
        try:
            for name in stage.needs:
                self._bring_back(_BY_NAME[name])
            if stage.name == "train":
                self._resume_training()
            elif not stage.resumable:
                shutil.rmtree(self._run.paths.stage_dir(stage.name), ignore_errors=True)
            self._watch(stage, record)
            self._complete(stage)
            record.result = "done"
        except Stopped:
            record.result = "stopped"
            raise
        finally:
            record.seconds = time.monotonic() - started
            self._console.stage_ended(record)

    def _bring_back(self, stage: Stage) -> None:
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

    def _resume_training(self) -> None:
        shutil.rmtree(self._run.paths.stage_dir("train"), ignore_errors=True)
        step = restore_newest(self._run, lambda text: self._console.say(text, "warning"))
        if step is not None:
            self._console.say(f"Going on from the checkpoint of step {step}.", step=step)
        self._syncer = Syncer(
            self._run,
            on_commit=lambda step, seconds: self._console.say(
                f"Checkpoint of step {step} stored in {seconds:.1f} s.", "debug", step=step
            ),
            on_failure=lambda text: self._console.say(text, "warning"),
        )

    def _watch(self, stage: Stage, record: StageRecord) -> None:
        """Start the stage's process, follow it to its end, and judge that."""
        process = self._process = StageProcess(self._run, stage)
        try:
            for event in process.events():
                self._heed(stage, event, record)
            code = process.wait()
        finally:
            self._process = None
            process.kill()
        self._finish_uploads()
        if code == 0:
            return
        error = process.why(code)
        if error.exit_code == ExitCode.BUG and self._stop_deadline is None:
            for line in process.last_lines:
                self._console.say(line, "error")
        if self._stop_deadline is not None and (code < 0 or error.exit_code in (ExitCode.TRY_AGAIN, ExitCode.BUG)):
            raise Stopped(f"Stage {stage.name} was stopped on request.", self._what_is_stored(stage))
        raise error

    def _what_is_stored(self, stage: Stage) -> str:
        if stage.name != "train":
            return f"Start the job again: it goes on with stage {stage.name}."
        steps = committed_steps(self._run)
        return f"Start the job again: it goes on from step {steps[0]}." if steps else "No checkpoint is stored yet."

    def _heed(self, stage: Stage, event: dict[str, Any], record: StageRecord) -> None:
        """Pass an event of the stage on to whom it concerns."""
        match event["event"]:
            case "message":
                self._console.say(event["text"], event["level"], stage=stage.name)
            case "progress":
                self._console.progress(stage.name, event)
            case "output":
                record.outputs.append(f"{event['what']}: {event['where']}")
            case "checkpoint" if self._syncer is not None:
                self._syncer.offer(int(event["step"]), Path(event["folder"]))

    def _finish_uploads(self) -> None:
        """The training has ended: give the last checkpoint its time, as much as a stop request leaves."""
        if self._syncer is None:
            return
        syncer, self._syncer = self._syncer, None
        while not syncer.drain(0.5):  # in slices, since a stop request may come while we wait
            if self._stop_deadline is not None and time.time() > self._stop_deadline:
                self._console.say("The last checkpoint was not stored in time.", "warning")
                break
        syncer.close()
        if self._stop_deadline is not None and syncer.failure is not None:
            raise syncer.failure

    def _complete(self, stage: Stage) -> None:
        """Write the marker that makes the stage's files count."""
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        if stage.name == "preflight":
            return
        if stage.name == "download":
            self._refuse_other_content(manifest.Manifest.of(folder, fingerprint))
        if stage.kept:
            manifest.commit(self._run.store, self._prefix(stage), folder, fingerprint)
        manifest.mark(folder, fingerprint)

    def _refuse_other_content(self, downloaded: manifest.Manifest) -> None:
        """A file that changed under its name would mix two datasets, or two models, in one run."""
        key = f"{self._run.id}/run.json"
        record = json.loads(self._run.store.get(key))
        files = {entry.path: entry.sha256 for entry in downloaded.files if not entry.path.endswith(".json")}
        begun = record.setdefault("files", files)
        differing = [name for name in sorted({*files, *begun}) if files.get(name) != begun.get(name)]
        if differing:
            raise SettingsError(
                f"Since run {self._run.id!r} began, its sources have changed: {', '.join(differing)}.",
                "Choose another FT_RUN_ID to train on what is there now.",
            )
        self._run.store.put(key, json.dumps(record, indent=1).encode())

    # -- stop requests ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """First signal: ask the stage to stop, and see to it that it does. One more after a while: at once."""
        grace = self._run.settings.stop_grace_seconds
        if self._stop_deadline is not None:
            if time.time() > self._stop_deadline - grace + _REPEAT_SECONDS:  # schedulers tend to signal twice
                self._kill_process()
            return
        self._stop_deadline = time.time() + grace
        write_json(self._run.paths.stop_file, self._stop_deadline)
        threading.Thread(target=self._enforce_deadline, args=(grace,), daemon=True).start()

    def _enforce_deadline(self, grace: float) -> None:
        time.sleep(grace)
        self._kill_process()
        time.sleep(_LAST_WORDS_SECONDS)
        # Only a transfer to or from the store can still be under way; it counts for nothing without its manifest.
        self._console.say("Stopped in the middle of a transfer; start the job again.", "error")
        os._exit(ExitCode.TRY_AGAIN)

    def _kill_process(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def _refuse_if_stopping(self) -> None:
        if self._stop_deadline is not None:
            raise Stopped("Stopped on request.", "Start the job again to go on.")
