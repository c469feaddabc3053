"""A node other than the first. It prepares on its own, trains with the others, and leaves the rest to the first."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from job.checkpoints import manifest
from job.checkpoints.folder_lock import FolderLock
from job.checkpoints.restore import clear, step_of_folder
from job.errors import JobError, KernelsFault, MemoryFull, TransientError
from job.nodes.rendezvous import OtherMember, Rendezvous
from job.run import Run
from job.stages import STAGES, Stage
from job.supervision.journal import Journal
from job.supervision.ledger import Ledger
from job.supervision.process import Launch
from job.supervision.supervisor import Supervisor

_OWN = ("preflight", "download", "prepare")


class Follower(Supervisor):
    """One start of one run on this node. Its files have their own folder, since nodes may share a file system.

    It takes no lease and commits nothing. It stays until the first node has stored the adapter. So a start that
    succeeded never has to be repeated.
    """

    def _work(self) -> str:
        if self._trained():
            return "trained; nothing to do on this node"
        nodes = OtherMember(self._run, self._interruption.wait, self._journal.say)
        lock = FolderLock(self._run.paths.lock_file)
        try:
            self._interruption.stop.pass_on()
            with nodes.following():
                self._ledger.refuse_other_settings()
                return self._train_with_the_others(nodes)
        finally:
            lock.close()

    def _train_with_the_others(self, nodes: OtherMember) -> str:
        for stage in STAGES:
            if stage.name in _OWN and not self._ledger.is_complete(stage):
                self._run_stage(stage, None, None)
        announced = nodes.await_announcement(self._trained)
        if announced is not None:
            self._ledger.refuse_other_settings(bound=True)
            self._keep_decisions()
            self._ledger.refuse_other_sources()  # by now the first node has recorded what it downloaded
            training = FollowerTraining(self._run, self._journal, nodes, *announced)
            self._run_stage(next(stage for stage in STAGES if stage.per_gpu), None, training)
            nodes.await_commit(self._trained)
        return "trained; the first node does the rest"

    def _shows_progress(self, stage: Stage) -> bool:
        """All nodes take the same steps, and the first node shows them."""
        return not stage.per_gpu

    def _trained(self) -> bool:
        """Whether the store has the trained adapter, or the requested stages do not need it."""
        return "train" not in Ledger(self._run).missing()


class FollowerTraining:
    """Training on this node. It resumes from exactly the checkpoint that the first node named, and stores nothing."""

    def __init__(
        self, run: Run, journal: Journal, nodes: OtherMember, rendezvous: Rendezvous, resume: str | None
    ) -> None:
        self._run, self._journal, self._nodes, self._resume = run, journal, nodes, resume
        self.launch = Launch(rendezvous)

    def prepare(self) -> None:
        paths = self._run.paths
        shutil.rmtree(paths.stage_dir("train"), ignore_errors=True)
        if self._resume is None:
            shutil.rmtree(paths.checkpoints_dir, ignore_errors=True)
            return
        step = step_of_folder(self._resume)
        clear(paths.checkpoints_dir, but="*.partial-*")  # keep what an earlier start has fetched of it
        try:
            manifest.restore(
                self._run.store, f"{self._run.id}/{self._resume}", paths.checkpoints_dir / f"checkpoint-{step}"
            )
        except manifest.Rejected as reason:
            raise TransientError(
                f"The checkpoint of step {step} arrived damaged: {reason}.", "Start the job again."
            ) from reason
        self._journal.say(f"Resuming from the checkpoint of step {step}.", step=step)

    def watched(self, on_lost: Callable[[Exception], None]) -> contextlib.AbstractContextManager[None]:
        return self._nodes.watched(on_lost)

    def moved(self) -> None:
        self._nodes.moved()

    def offer(self, step: int, folder: Path, save_seconds: float) -> None:
        """Do nothing: the first node stores what the ranks saved together."""

    def finish(self) -> None:
        """Do nothing: there is nothing to store."""

    def why(self, error: JobError) -> JobError:
        return self._nodes.why(error)

    def adapt(self, error: MemoryFull | KernelsFault) -> str | None:
        """None: with several nodes, the scheduler decides about another start."""
        return None

    def resumes_from(self) -> str:
        return "Start the job again on all nodes. The first node knows where to resume."
