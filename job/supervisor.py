"""The parent of everything: starts stages, passes stop requests on, stores what they make, decides the exit code.

It imports neither torch nor transformers: signals, uploads and exit codes must not depend on a library that may crash.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from job.checkpoints.restore import committed_steps, restore_newest
from job.checkpoints.syncer import Syncer
from job.errors import ExitCode, Stopped
from job.ledger import Ledger
from job.process import StageProcess
from job.report.console import Console, StageRecord
from job.run import Run, write_json
from job.stages import STAGES, Stage

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS, _LAST_WORDS_SECONDS = 2, 3
_BY_NAME = {stage.name: stage for stage in STAGES}


class Supervisor:
    """One start of one run. `supervise()` returns when every requested stage is complete, or raises why not."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console, self._ledger = run, console, Ledger(run)
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
                self._ledger.begin()
                did = self._run_missing()
            closing = f"Run {self._run.id} is {did}."
        finally:
            if self._records:
                self._console.summary(self._records, closing)

    def _run_missing(self) -> str:
        missing = self._ledger.missing()
        for stage in STAGES:
            if stage.name in missing:
                self._run_stage(stage)
            elif stage.name in self._run.settings.stages:
                self._records.append(StageRecord(stage.name, "skipped"))
        return "complete" if missing else "complete already; nothing to do"

    # -- one stage --------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        self._refuse_if_stopping()
        self._console.stage_started(stage.name)
        record = StageRecord(stage.name, "failed")
        self._records.append(record)
        started = time.monotonic()
        try:
            for name in stage.needs:
                self._ledger.bring_back(_BY_NAME[name])
            if stage.name == "train":
                self._resume_training()
            elif not stage.resumable:
                shutil.rmtree(self._run.paths.stage_dir(stage.name), ignore_errors=True)
            self._watch(stage, record)
            self._ledger.complete(stage)
            record.result = "done"
        except Stopped:
            record.result = "stopped"
            raise
        finally:
            record.seconds = time.monotonic() - started
            self._console.stage_ended(record)

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
