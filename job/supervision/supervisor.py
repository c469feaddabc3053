"""The supervisor starts the stages, passes on stop requests, stores results and decides the exit code.

It imports neither torch nor transformers: signals, uploads and exit codes must not depend on a library that may crash.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from job.checkpoints.lease import Lease
from job.checkpoints.retention import sweep
from job.errors import ExitCode, JobError, KernelsFault, MemoryFull, NoProgress, Retry, Stopped, exit_code_of, in_a_line
from job.gpus import watch_for_xids
from job.guard.secrets import masked, secret_values
from job.nodes.rendezvous import FirstNode
from job.report.console import Console, StageRecord
from job.run import Run
from job.stages import STAGES, Stage, stages_of, turn
from job.storage.proof import prove
from job.supervision.background_hashing import BackgroundHashing, Completion, GoOn
from job.supervision.checkpointing import Checkpointing
from job.supervision.idle import IdleStarts, refuse
from job.supervision.interruption import Interruption
from job.supervision.journal import Journal
from job.supervision.ledger import Ledger
from job.supervision.prestart import Prestarted
from job.supervision.process import Launch, StageProcess
from job.supervision.stall import StallWatch, stalled
from job.supervision.training import LeadTraining, Training

_BY_NAME = {stage.name: stage for stage in STAGES}


class Supervisor:
    """One start of one run. `supervise()` returns when every requested stage is complete, and raises otherwise."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run = run
        self._journal = Journal(run, console)
        metrics = self._journal.metrics
        self._interruption = Interruption(run, self._journal.say, lambda: not metrics.healthy())
        self._stall = StallWatch(metrics, run.settings.stall_seconds, self._interruption.lose)
        self._ledger = Ledger(run)
        self._hashing = BackgroundHashing(self._interruption.lose)
        self._sharing = BackgroundHashing(self._tell_unshared)

    def supervise(self) -> None:
        """Run the requested stages that are not complete, in order. Always prints the closing table."""
        closing, ending = f"Run {self._run.id} is not complete.", None
        try:
            self._journal.serve_metrics()
            watch_for_xids(self._journal.gpu_failed)
            with self._interruption.stop.heeded():
                closing = f"Run {self._run.id} is {self._work()}."
        except BaseException as error:
            ending = error
            raise
        finally:
            hashing = self._hashing
            self._journal.close(closing, ending, unhashed=hashing.undone, failed=hashing.failed)

    def _work(self) -> str:
        """Run what is missing. Returns the state of the run for the closing line."""
        self._ledger.refuse_other_settings()
        if not self._ledger.missing():
            return self._run_missing(None)
        starts = IdleStarts(self._run)
        starts.begin()
        self._ledger.on_commit = starts.stored
        try:
            closing = self._work_as_an_attempt()
        except BaseException as error:
            if _is_final(error):
                starts.stored()
            elif not isinstance(error, NoProgress):
                starts.ended(masked(_reason(error), secret_values()))
            raise
        starts.stored()
        return closing

    def _work_as_an_attempt(self) -> str:
        prove(self._run.store, self._run.id)
        lease = Lease.take(self._run, self._journal.say, lambda: self._interruption.stop.requested)
        ended, final, code = "", True, 0
        try:
            return self._run_under(lease)
        except BaseException as error:
            ended = lease.record.ended if isinstance(error, NoProgress) else _reason(error)
            final, code = _is_final(error), int(exit_code_of(error))
            raise
        finally:
            lease.release(ended, final=final, exit_code=code)

    def _run_under(self, lease: Lease) -> str:
        """Run what is missing under the lease, while no other start writes to the run."""
        attempt = lease.record.attempt
        lease.keep_alive(self._interruption.lose, self._journal.metrics.unsaved_seconds)
        refuse(self._run, lease.record.idle, lease.record.ended)
        self._ledger.begin(lease)
        self._keep_decisions()
        self._interruption.stop.pass_on()
        self._journal.metrics.attempt(attempt, lease.former.exit_code)
        self._journal.say(f"Attempt {attempt} of the run.", "debug", attempt=attempt)
        self._sweep(lease)
        checkpointing = Checkpointing(
            self._run, self._journal, self._interruption.stop, self._hashing.settle, self._ledger.on_commit
        )
        if self._run.node.count == 1 or "train" not in self._ledger.missing():
            return self._run_missing(LeadTraining(self._run, checkpointing, lease, None))
        nodes = FirstNode(self._run, self._interruption.wait, self._journal.say)
        with nodes.leading(attempt):
            return self._run_missing(LeadTraining(self._run, checkpointing, lease, nodes))

    def _keep_decisions(self) -> None:
        """Tell the stages' processes what the run's first start decided."""
        dtype = self._ledger.decided("compute_dtype")
        if dtype in ("float16", "bfloat16", "float32"):
            os.environ["JOB_COMPUTE_DTYPE"] = dtype
        if self._ledger.decided("train_on") == "all":
            os.environ["JOB_TRAIN_ON"] = "all"

    def _sweep(self, lease: Lease) -> None:
        try:
            swept = sweep(self._run, lease)
        except JobError as error:  # leftovers cost space, not work, and a policy may forbid this
            self._journal.warn(
                f"What killed starts left in the store was not removed: {error.message} {error.hint}".rstrip()
            )
        else:
            if swept:
                self._journal.say(f"Removed {swept} leftovers of killed starts from the store.", "debug")

    def _run_missing(self, training: Training | None) -> str:
        missing = self._ledger.missing()
        prestarted = Prestarted(self._run, missing, self._journal.warn)
        try:
            for stage in stages_of(self._run.settings):
                if stage.name in missing:
                    self._run_stage(stage, prestarted, training)
                elif stage.name in self._run.settings.stages:
                    self._journal.skipped(stage)
            self._hashing.settle()
            self._sharing.settle_quietly()
        finally:
            prestarted.kill()
            self._hashing.abandon()
            self._sharing.abandon(wait=False)
        return "complete" if missing else f"complete already; nothing to do{self._whereabouts()}"

    def _whereabouts(self) -> str:
        """Where a complete run's model is, for the closing line."""
        record = self._ledger.published()
        if record is None:
            return ""
        return f". The model is at {record.get('page') or record['destination']}"

    # -- one stage --------------------------------------------------------------------------------------------------

    def _run_stage(self, stage: Stage, prestarted: Prestarted | None, training: Training | None) -> None:
        """Run a stage, from fetching the files it needs to writing the marker that makes its own files count."""
        self._interruption.refuse_if_ending()
        with self._journal.stage(stage) as record:
            if stage.online:
                self._hashing.settle()  # what leaves this machine must count here first
            for name in stage.needs:
                self._ledger.bring_back(_BY_NAME[name])
            if self._ledger.take_shared(stage):
                self._journal.say(f"Stage {stage.name} was finished by an earlier start, and its result is stored.")
                return
            if self._ledger.adopt(stage):
                self._journal.say(f"Stage {stage.name} was finished by an earlier start, and is stored now.")
                return
            if stage.per_gpu:
                assert training is not None, "only a start that may write trains"
                self._train(stage, prestarted, training, record)
            else:
                if not stage.resumable:
                    shutil.rmtree(self._run.paths.stage_dir(stage.name), ignore_errors=True)
                process = self._start(stage, prestarted)
                self._judge(stage, process, self._follow(process, record))
            self._complete(stage)

    def _train(self, stage: Stage, prestarted: Prestarted | None, training: Training, record: StageRecord) -> None:
        """Run the training stage. If it runs out of memory or a kernel fails, run it again in another way."""
        while True:
            training.prepare()
            try:
                return self._train_once(stage, prestarted, training, record)
            except (MemoryFull, KernelsFault) as error:
                way = None if self._interruption.stop.requested else training.adapt(error)
                if way is None:
                    raise
                self._journal.warn(f"{error.message} Starting the training again {way}.")

    def _train_once(self, stage: Stage, prestarted: Prestarted | None, training: Training, record: StageRecord) -> None:
        process = self._start(stage, prestarted, training.launch)
        code = self._follow(process, record, training)
        training.finish()
        self._judge(stage, process, code, training)

    def _start(self, stage: Stage, prestarted: Prestarted | None, launch: Launch | None = None) -> StageProcess:
        turn.give(self._run, stage.name)
        waiting = prestarted.take(stage) if prestarted is not None else None
        return waiting or StageProcess(self._run, stage, launch)

    def _follow(self, process: StageProcess, record: StageRecord, training: Training | None = None) -> int:
        """Read the events of a stage's process until it exits. Returns its exit status."""
        with self._interruption.may_kill(process), self._stall.watching(process):
            if training is None:
                return self._listen(process, record, None)
            with training.watched(self._interruption.lose):
                return self._listen(process, record, training)

    def _listen(self, process: StageProcess, record: StageRecord, training: Training | None) -> int:
        for event in process.events():
            if not process.stage.per_gpu:
                self._journal.metrics.moved()
            self._heed(process.stage, event, record, training)
        return process.wait()

    def _heed(self, stage: Stage, event: dict[str, Any], record: StageRecord, training: Training | None) -> None:
        """Pass an event of the stage on to those it concerns."""
        match event["event"]:
            case "message":
                self._journal.say(event["text"], event["level"], stage=stage.name)
            case "progress":
                if training is not None:
                    training.moved()
                self._journal.progress(stage, event, shown=self._shows_progress(stage))
            case "output":
                record.outputs.append(f"{event['what']}: {event['where']}")
                record.figures |= event.get("figures", {})
            case "decided":
                self._ledger.note(event["facts"])
            case "checkpoint":
                assert training is not None, "only training writes checkpoints"
                training.offer(int(event["step"]), Path(event["folder"]), float(event["seconds"]))

    def _shows_progress(self, stage: Stage) -> bool:
        return True

    def _judge(self, stage: Stage, process: StageProcess, code: int, training: Training | None = None) -> None:
        """Raise what ended the stage, unless it succeeded."""
        self._interruption.refuse_if_lost()
        if code == 0:
            return
        stopped = self._interruption.stop.requested
        error = self._explain(stage, process, code)
        if self._interruption.stop.while_stalled:
            raise stalled(stage.name, self._run.settings.stall_seconds)
        if error.exit_code == ExitCode.BUG and not stopped:
            for line in process.last_lines:
                self._journal.say(line, "error")
        if training is not None and not stopped:
            error = training.why(error)
        if stopped and (code < 0 or error.exit_code in (ExitCode.TRY_AGAIN, ExitCode.BUG)):
            again = training.resumes_from() if training else f"Start the job again: it resumes with stage {stage.name}."
            raise Stopped(f"Stage {stage.name} was stopped on request.", again)
        raise error

    def _explain(self, stage: Stage, process: StageProcess, code: int) -> JobError:
        """What ended the stage. Before a file is blamed, its bytes are compared with those that its source lists."""
        error = process.why(code)
        if error.exit_code in (ExitCode.BAD_INPUT, ExitCode.BUG) and not stage.online:
            self._hashing.settle()
        if error.exit_code == ExitCode.BAD_INPUT and stage.name in ("download", "prepare"):
            self._hashing.abandon()
            self._ledger.forget_sources()
        return error

    def _complete(self, stage: Stage) -> None:
        """Make the stage's files count.

        Nothing outlives this machine before everything it was made from counts. Several nodes compare their downloads
        before they train, so they do not hash in the background.
        """
        if stage.hashed_behind and self._run.node.count == 1:
            self._hashing.add(stage.name, self._then_share(stage, self._ledger.completion(stage)))
            return
        self._hashing.settle()
        self._then_share(stage, self._ledger.completion(stage))(lambda: None)

    def _then_share(self, stage: Stage, completion: Completion) -> Completion:
        """The completion of a stage, after which its result is stored in the background, if it is to be shared."""
        if not stage.shared:
            return completion

        def complete(go_on: GoOn) -> None:
            completion(go_on)
            self._sharing.add(stage.name, lambda go_on: self._ledger.share(stage, go_on))

        return complete

    def _tell_unshared(self, error: Exception) -> None:
        self._journal.warn(
            f"The prepared data was not stored, so another machine would prepare it again: {_reason(error)}"
        )


def _is_final(error: BaseException) -> bool:
    """Whether no scheduler starts the job again after this error, so that it is no turn of a loop."""
    return isinstance(error, JobError) and error.retry is Retry.NO and not isinstance(error, NoProgress)


def _reason(error: BaseException) -> str:
    return getattr(error, "message", None) or in_a_line(error)
