"""The parent of everything: starts stages, passes stop requests on, stores what they make, decides the exit code.

It imports neither torch nor transformers: signals, uploads and exit codes must not depend on a library that may crash.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from job.checkpoints import manifest
from job.checkpoints.restore import restore_newest
from job.checkpoints.syncer import Syncer
from job.environment import as_json
from job.errors import InputError, JobError, SettingsError, Stopped, TransientError, from_code
from job.report.console import Console, StageRecord
from job.report.events import parse
from job.run import Run, now, read_json, write_json
from job.settings import SECRET_VARIABLES, masked, secret_values, variable
from job.stages import STAGES, Stage

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_BY_NAME = {stage.name: stage for stage in STAGES}


class Supervisor:
    """One start of one run. `supervise()` returns when every requested stage is complete, or raises why not."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._records: list[StageRecord] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._stop_deadline: float | None = None
        self._syncer: Syncer | None = None
        self._lines: deque[str] = deque(maxlen=20)

    def supervise(self) -> None:
        """Run what is missing of the requested stages, in order."""
        run = self._run
        run.paths.run_dir.mkdir(parents=True, exist_ok=True)
        run.paths.stop_file.unlink(missing_ok=True)
        self._claim()
        with self._stop_signals():
            missing = self._missing()
            for stage in STAGES:
                if stage.name in missing:
                    self._run_stage(stage)
                elif stage.name in run.settings.stages:
                    self._records.append(
                        StageRecord(stage.name, "skipped", outputs=["complete already"] if missing else [])
                    )
        did = "complete" if missing else "complete already; nothing to do"
        self._console.summary(self._records, f"Run {run.id} is {did}.")

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
        for stage in reversed(STAGES):
            wanted = stage.name in self._run.settings.stages or any(
                stage.name in _BY_NAME[name].needs for name in missing
            )
            if wanted and stage.name != "preflight" and not self._is_complete(stage):
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
        """Start the stage's process, follow its output to the end, and judge its exit."""
        self._run.paths.log_file(stage.name).parent.mkdir(parents=True, exist_ok=True)
        for stale in self._run.paths.error_file(stage.name, 0).parent.glob(f"{stage.name}-rank*.json"):
            stale.unlink()
        with subprocess.Popen(
            [sys.executable, "-m", "job.stage", stage.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=_child_environment(stage),
            cwd=Path(__file__).parent.parent,
            start_new_session=True,  # a terminal's Ctrl-C is for us alone
        ) as child:
            self._child = child
            try:
                self._relay(child, stage, record)
                code = child.wait()
            finally:
                self._child = None
        self._finish_uploads()
        if code != 0:
            raise self._why(stage, code)

    def _relay(self, child: subprocess.Popen[bytes], stage: Stage, record: StageRecord) -> None:
        """Events to the console and the syncer; every other line, secrets masked, to the stage's log file."""
        assert child.stdout is not None
        secrets = secret_values()
        self._lines.clear()
        with self._run.paths.log_file(stage.name).open("a", encoding="utf-8") as log:
            for raw in child.stdout:
                line = raw.decode("utf-8", "replace").rstrip("\n").rsplit("\r", 1)[-1]
                event = parse(line)
                if event is None:
                    plain = masked(line, secrets)
                    log.write(f"{plain}\n")
                    log.flush()
                    self._lines.append(plain)
                    self._console.say(plain, "debug", stage=stage.name)
                elif event["event"] == "message":
                    self._console.say(event["text"], event["level"], stage=stage.name)
                elif event["event"] == "progress":
                    self._console.progress(stage.name, event)
                elif event["event"] == "output":
                    record.outputs.append(f"{event['what']}: {event['where']}")
                elif event["event"] == "checkpoint" and self._syncer is not None:
                    self._syncer.offer(int(event["step"]), Path(event["folder"]))

    def _finish_uploads(self) -> None:
        """The training has ended: give the last checkpoint its time, as much as a stop request leaves."""
        if self._syncer is None:
            return
        syncer, self._syncer = self._syncer, None
        left = None if self._stop_deadline is None else max(0.0, self._stop_deadline - time.time())
        if not syncer.drain(left):
            self._console.say("The last checkpoint was not stored in time.", "warning")
        syncer.close()

    def _why(self, stage: Stage, code: int) -> JobError:
        """The error that ended a stage: the lowest rank's own words, else what the exit status tells."""
        if self._stop_deadline is not None and code < 0:
            return Stopped(f"Stage {stage.name} was stopped.", "Start the job again to go on from the last checkpoint.")
        folder = self._run.paths.error_file(stage.name, 0).parent
        written = [read_json(path) for path in sorted(folder.glob(f"{stage.name}-rank*.json"))]
        written.sort(key=lambda item: item["exit_code"] == Stopped.exit_code)  # one rank's failure makes others stop
        if written:
            first = written[0]
            error = from_code(first["exit_code"], first["message"], first["mend"])
            if error.exit_code == JobError.exit_code:
                self._show_last_lines()
            return (
                Stopped(first["message"], first["mend"])
                if self._stop_deadline and isinstance(error, TransientError)
                else error
            )
        self._show_last_lines()
        if code < 0:
            hint = " The kernel does this when memory runs out." if -code == signal.SIGKILL else ""
            return JobError(
                f"Stage {stage.name} was ended by {signal.Signals(-code).name}.{hint}", self._see_log(stage)
            )
        return JobError(f"Stage {stage.name} ended with exit code {code}.", self._see_log(stage))

    def _show_last_lines(self) -> None:
        for line in self._lines:
            self._console.say(line, "error")

    def _see_log(self, stage: Stage) -> str:
        return f"Its output is in {self._run.paths.log_file(stage.name)}."

    def _complete(self, stage: Stage) -> None:
        """Write the marker that makes the stage's files count."""
        folder, fingerprint = self._run.paths.stage_dir(stage.name), self._run.settings.fingerprint(stage.name)
        if stage.name == "preflight":
            return
        if stage.kept:
            manifest.commit(self._run.store, self._prefix(stage), folder, fingerprint)
        manifest.mark(folder, fingerprint)

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
        """First signal: ask the stage to stop, and see to it that it does. Second one: at once."""
        if self._stop_deadline is not None:
            self._kill_child()
            return
        grace = self._run.settings.stop_grace_seconds
        self._stop_deadline = time.time() + grace
        write_json(self._run.paths.stop_file, self._stop_deadline)
        threading.Thread(target=self._enforce_deadline, args=(grace,), daemon=True).start()

    def _enforce_deadline(self, grace: float) -> None:
        time.sleep(grace)
        self._kill_child()

    def _kill_child(self) -> None:
        child = self._child
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def _refuse_if_stopping(self) -> None:
        if self._stop_deadline is not None:
            raise Stopped("Stopped on request.", "Start the job again to go on.")


def _child_environment(stage: Stage) -> dict[str, str]:
    """Our environment, less the secrets that are none of the stage's business, and quiet."""
    environment = {
        name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES or name in stage.secrets
    }
    environment |= {
        "JOB_SUPERVISOR_PID": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "warning"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get(
            "TOKENIZERS_PARALLELISM", "true" if stage.name == "prepare" else "false"
        ),
    }
    if not stage.online:  # a stage that has its files must not find itself asking the network for more
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return environment
