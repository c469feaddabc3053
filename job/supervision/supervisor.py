"""The parent of everything: starts stages, passes stop requests on, stores what they make, decides the exit code.

It imports neither torch nor transformers: signals, uploads and exit codes must not depend on a library that may crash.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from job.checkpoints.lease import Lease
from job.checkpoints.restore import committed_checkpoints, step_of
from job.checkpoints.retention import sweep
from job.errors import ExitCode, JobError, KernelsFault, MemoryFull, Stopped
from job.nodes.rendezvous import Gang, Rendezvous
from job.report.console import Console, StageRecord
from job.report.metrics import Metrics
from job.run import Run
from job.stages import STAGES, Stage, turn
from job.supervision.background_hashing import Completions
from job.supervision.checkpointing import Checkpointing
from job.supervision.ledger import Ledger
from job.supervision.prestart import EarlyProcesses
from job.supervision.process import StageProcess
from job.supervision.stop import StopRequest

_BY_NAME = {stage.name: stage for stage in STAGES}


class Supervisor:
    """One start of one run. `supervise()` returns when every requested stage is complete, or raises why not."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console, self._ledger = run, console, Ledger(run)
        self._records: list[StageRecord] = []
        self._stop = StopRequest(run, self._kill_process, self._warn)
        self._process: StageProcess | None = None
        self._early = EarlyProcesses(run, set(), self._warn)
        self._completions = Completions(self._on_lost)
        self._lost: Exception | None = None
        self._metrics = Metrics(run.id, run.settings.stall_seconds)
        self._checkpointing = Checkpointing(run, console, self._metrics, self._stop, self._completions.settle)
        self._gang = Gang(run, self._wait, console.say) if run.node.count > 1 else None
        self._rendezvous: Rendezvous | None = None
        self._plan_steps_down, self._kernels = 0, True

    def supervise(self) -> None:
        """Run what is missing of the requested stages, in order; the closing table is printed in every case."""
        closing = f"Run {self._run.id} is not complete."
        try:
            self._serve_metrics()
            with self._stop.heeded():
                did = self._work()
            closing = f"Run {self._run.id} is {did}."
        finally:
            for record in self._records:
                if record.stage in self._completions.undone:  # it had ended well, and the next start does it again
                    record.result = "failed" if record.stage == self._completions.failed else "unfinished"
            if self._records:
                self._console.summary(self._records, closing)

    def _serve_metrics(self) -> None:
        port = self._run.settings.metrics_port
        if port is None:
            return
        try:
            self._metrics.serve(port)
        except OSError as error:  # several jobs on one machine: no reason not to train
            self._warn(f"No metrics: FT_METRICS_PORT={port} cannot be used: {error.strerror}.")

    def _work(self) -> str:
        self._ledger.refuse_other_settings()
        return self._run_alone() if self._ledger.missing() else self._run_missing()

    def _run_alone(self) -> str:
        """Take the lease, so that nobody else writes, and do what is missing under it."""
        lease = Lease.take(self._run, self._console.say, lambda: self._stop.requested)
        try:
            lease.keep_alive(self._on_lost)
            self._ledger.begin(lease)
            self._lease = lease
            self._stop.pass_on()
            self._metrics.attempt(lease.record.attempt)
            self._console.say(f"Attempt {lease.record.attempt} of the run.", "debug", attempt=lease.record.attempt)
            self._sweep()
            if self._gang is None or "train" not in self._ledger.missing():
                return self._run_missing()
            with self._gang.led(lease.record.attempt):
                return self._run_missing()
        finally:
            lease.release()

    def _sweep(self) -> None:
        try:
            swept = sweep(self._run, self._lease)
        except JobError as error:  # it costs space, not work; a policy may allow less than this needs
            self._warn(f"What killed starts left in the store stays there: {error.message}")
        else:
            if swept:
                self._console.say(f"{swept} leftovers of killed starts removed from the store.", "debug")

    def _run_missing(self) -> str:
        missing = self._ledger.missing()
        self._early = EarlyProcesses(self._run, missing, self._warn)
        try:
            for stage in STAGES:
                if stage.name in missing:
                    self._run_stage(stage)
                elif stage.name in self._run.settings.stages:
                    self._records.append(StageRecord(stage.name, "skipped"))
            self._completions.settle()
        finally:
            self._early.kill()
            self._completions.abandon()
        return "complete" if missing else "complete already; nothing to do"

    # -- one stage --------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage) -> None:
        self._refuse_if_ending()
        self._console.stage_started(stage.name)
        self._metrics.stage(stage.name)
        record = StageRecord(stage.name, "failed")
        self._records.append(record)
        started = time.monotonic()
        try:
            if stage.online:
                self._completions.settle()  # what it sends away counts here
            for name in stage.needs:
                self._ledger.bring_back(_BY_NAME[name])
            if stage.name == "train":
                self._checkpointing.fetch_kernels()
                self._resume_training()
            elif not stage.resumable:
                shutil.rmtree(self._run.paths.stage_dir(stage.name), ignore_errors=True)
            self._watch_until_it_can(stage, record)
            self._complete(stage)
            record.result = "done"
        except Stopped:
            record.result = "stopped"
            raise
        finally:
            record.seconds = time.monotonic() - started
            self._metrics.stage(None)
            self._console.stage_ended(record)

    def _complete(self, stage: Stage) -> None:
        """Let the stage's files count. Nothing outlives this machine before all that it was made of does count, and nodes compare
        what they have downloaded before they train."""
        if stage.hashed_behind and self._gang is None:
            self._completions.add(stage.name, self._ledger.completion(stage))
            return
        self._completions.settle()
        self._ledger.complete(stage)

    def _watch_until_it_can(self, stage: Stage, record: StageRecord) -> None:
        """Processes that train together cannot take a step again, one of which it left in the middle of a sum, and none outlives
        a kernel's fault: the stage is started again in another way, and goes on from the last checkpoint. Nodes leave that to
        their scheduler."""
        while True:
            try:
                return self._watch(stage, record)
            except (MemoryFull, KernelsFault) as error:
                if self._gang is not None or self._stop.requested or not self._kernels:
                    raise
                if isinstance(error, MemoryFull):
                    self._plan_steps_down += 1
                    way = "with a smaller plan"
                else:
                    self._kernels = False
                    way = "without kernels of the job's own, which is slower"
                self._warn(f"{error.message} Starting the training again {way}.")
                self._resume_training()

    def _resume_training(self) -> None:
        shutil.rmtree(self._run.paths.stage_dir("train"), ignore_errors=True)
        commit = self._checkpointing.resume(self._lease)
        if self._gang is not None:
            self._gang.gather()
            self._rendezvous = self._gang.announce(commit)

    def _watch(self, stage: Stage, record: StageRecord) -> None:
        """Start the stage's process, follow it to its end, and judge that."""
        self._metrics.training(stage.per_gpu)
        rendezvous = self._rendezvous if stage.per_gpu else None
        turn.give(self._run, stage.name)
        process = self._process = self._early.take(stage) or StageProcess(
            self._run, stage, rendezvous, self._plan_steps_down, kernels=self._kernels
        )
        gang = self._gang if stage.per_gpu else None
        try:
            self._refuse_if_lost()  # from here on whoever finds out kills the process
            with gang.watched(self._on_lost) if gang else contextlib.nullcontext():
                for event in process.events():
                    self._heed(stage, event, record)
                code = process.wait()
        finally:
            self._process = None
            process.kill()
            self._metrics.training(False)
        self._checkpointing.finish()
        self._refuse_if_lost()
        if code == 0:
            return
        error = process.why(code)
        if error.exit_code == ExitCode.BUG and not self._stop.requested:
            for line in process.last_lines:
                self._console.say(line, "error")
        if gang is not None and not self._stop.requested:
            error = gang.why(error)
        if self._stop.requested and (code < 0 or error.exit_code in (ExitCode.TRY_AGAIN, ExitCode.BUG)):
            raise Stopped(f"Stage {stage.name} was stopped on request.", self._what_is_stored(stage))
        raise error

    def _what_is_stored(self, stage: Stage) -> str:
        if stage.name != "train":
            return f"Start the job again: it goes on with stage {stage.name}."
        stored = committed_checkpoints(self._run, self._lease.record)
        if not stored:
            return "Start the job again. No checkpoint is stored yet."
        return f"Start the job again: it goes on from step {step_of(stored[0])}."

    def _heed(self, stage: Stage, event: dict[str, Any], record: StageRecord) -> None:
        """Pass an event of the stage on to whom it concerns."""
        match event["event"]:
            case "message":
                self._console.say(event["text"], event["level"], stage=stage.name)
            case "progress":
                self._metrics.progress(stage.name, event)
                if self._gang is not None and stage.per_gpu:
                    self._gang.moved()
                self._show_progress(stage, event)
            case "output":
                record.outputs.append(f"{event['what']}: {event['where']}")
            case "checkpoint":
                self._checkpointing.offer(int(event["step"]), Path(event["folder"]))

    def _show_progress(self, stage: Stage, event: dict[str, Any]) -> None:
        self._console.progress(stage.name, event)

    # -- what ends a start early ------------------------------------------------------------------------------------

    def _on_lost(self, reason: Exception) -> None:
        """Another attempt has taken over, another node is gone, or the sources are not those that the run began with: nothing
        that is done from here on would count."""
        self._lost = reason
        self._kill_process()

    def _kill_process(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    def _refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _refuse_if_ending(self) -> None:
        self._refuse_if_lost()
        if self._stop.requested:
            raise Stopped("Stopped on request.", "Start the job again to go on.")

    def _wait(self) -> None:
        self._refuse_if_ending()
        time.sleep(0.5)

    def _warn(self, text: str) -> None:
        self._console.say(text, "warning")
