"""A node other than the first: it prepares for itself, trains with the others, and leaves the rest to the first."""

from __future__ import annotations

import shutil
from typing import Any

from job.checkpoints import manifest
from job.checkpoints.folder_lock import FolderLock
from job.checkpoints.restore import clear, step_of_folder
from job.errors import TransientError
from job.stages import STAGES, Stage
from job.supervision.ledger import Ledger
from job.supervision.supervisor import Supervisor

_OWN = ("preflight", "download", "prepare")


class Follower(Supervisor):
    """One start of one run on this node. Its files lie in a folder of their own, since nodes may share a file system.

    It takes no lease and commits nothing. It stays until the first node has stored what was trained, so that a start
    which ended well never has to be repeated.
    """

    def _work(self) -> str:
        if self._trained():
            return "trained; nothing to do on this node"
        assert self._gang is not None
        lock = FolderLock(self._run.paths.lock_file)
        try:
            self._stop.pass_on()
            with self._gang.followed():
                self._ledger.refuse_other_settings()
                return self._train_with_the_others()
        finally:
            lock.close()

    def _train_with_the_others(self) -> str:
        assert self._gang is not None
        for stage in STAGES:
            if stage.name in _OWN and not self._ledger.is_complete(stage):
                self._run_stage(stage)
        announced = self._gang.await_announcement(self._trained)
        if announced is not None:
            self._ledger.refuse_other_sources()  # the first node has written down by now what it downloaded
            self._rendezvous, self._resume = announced
            self._run_stage(next(stage for stage in STAGES if stage.name == "train"))
            self._gang.await_commit(self._trained)
        return "trained; the first node does the rest"

    def _resume_training(self) -> None:
        """Fetch the very checkpoint that the first node goes on from."""
        paths = self._run.paths
        shutil.rmtree(paths.stage_dir("train"), ignore_errors=True)
        if self._resume is None:
            shutil.rmtree(paths.checkpoints_dir, ignore_errors=True)
            return
        step = step_of_folder(self._resume)
        clear(paths.checkpoints_dir, but="*.partial-*")  # what an earlier start had fetched of it
        try:
            manifest.restore(
                self._run.store, f"{self._run.id}/{self._resume}", paths.checkpoints_dir / f"checkpoint-{step}"
            )
        except manifest.Rejected as reason:
            raise TransientError(
                f"The checkpoint of step {step} did not arrive whole: {reason}.", "Start the job again."
            ) from reason
        self._console.say(f"Going on from the checkpoint of step {step}.", step=step)

    def _what_is_stored(self, stage: Stage) -> str:
        return "Start the job again on all nodes: the first one knows from where."

    def _show_progress(self, stage: Stage, event: dict[str, Any]) -> None:
        """The steps are everybody's, and the first node shows them."""
        if not stage.per_gpu:
            super()._show_progress(stage, event)

    def _trained(self) -> bool:
        """Whether the store has the trained adapter, or the first node was not asked for one."""
        return "train" not in Ledger(self._run).missing()
