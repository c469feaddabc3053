"""Whatever happens, in any order, the newest intact checkpoint is kept and the next start resumes from it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from job.checkpoints.lease import Commit, Lease
from job.checkpoints.manifest import commit
from job.checkpoints.restore import checkpoint_at, restore_newest, step_of
from job.checkpoints.retention import apply_retention, sweep
from job.errors import TransientError
from job.paths import Paths
from job.storage.local import LocalStore

_IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # on a disk every write would wait
TEMPLATE: list[Any] = []  # a Run, because hypothesis builds its state machines without fixtures


@pytest.fixture(autouse=True)
def template(make_run: Any) -> Iterator[None]:
    TEMPLATE[:] = [make_run()]
    yield
    TEMPLATE.clear()


class FlakyStore(LocalStore):
    """A folder that fails after `allowed` more operations. None means no limit."""

    allowed: int | None = None

    def _errors(self, key: str, writing: bool = False) -> Any:
        if self.allowed is not None:
            if self.allowed <= 0:
                raise TransientError("the store went away")
            self.allowed -= 1
        return super()._errors(key, writing)


class Checkpoints(RuleBasedStateMachine):
    """Saves, failures in the middle of a save or a deletion, damage, stale writers and restarts."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=_IN_MEMORY))
        self.store = FlakyStore(self.folder / "store")
        self.machines = 0
        self.contents: dict[str, bytes] = {}  # commit folder → what was committed there
        self.damaged: set[str] = set()
        self.there: set[Commit] = set()  # committed and, as far as the job can know, intact and not deleted
        self.step = 0
        self._start()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def _start(self) -> None:
        self.machines += 1
        self.run_ = replace(TEMPLATE[0], paths=Paths(self.folder / f"machine-{self.machines}", "run"), store=self.store)
        self.lease = Lease.take(self.run_, lambda text: None, lambda: False)
        sweep(self.run_, self.lease)
        self.restored = restore_newest(self.run_, self.lease.record, lambda text: None)
        self.step = self.restored.step or 0
        self.there -= {found for found in self.there if found.folder in self.damaged}

    def _remember(self) -> None:
        commit = checkpoint_at(self.step, self.lease.record.attempt)
        self.contents[commit.folder] = self.data
        self.there.add(commit)

    def _save(self, lease: Lease) -> None:
        self.step += 1
        place = checkpoint_at(self.step, lease.record.attempt).folder
        self.data = f"{place} of start {self.machines}".encode()
        source = self.folder / "saved"
        source.mkdir(exist_ok=True)
        (source / "state").write_bytes(self.data)
        commit(self.store, f"run/{place}", source, self.run_.settings.fingerprint("train"), lease.renew)

    @rule()
    def save(self) -> None:
        self._save(self.lease)
        self._remember()
        apply_retention(self.run_, self.lease, self.restored.rejected)

    @rule(allowed=st.integers(0, 12))
    def save_while_the_store_goes_away(self, allowed: int) -> None:
        self.store.allowed = allowed
        try:
            self._save(self.lease)
            self._remember()
            apply_retention(self.run_, self.lease, self.restored.rejected)
        except TransientError:
            pass
        finally:
            self.store.allowed = None

    @precondition(lambda self: self.lease.record.commits(self.run_, "checkpoints"))
    @rule(data=st.data())
    def damage_one(self, data: st.DataObject) -> None:
        whole = [found.folder for found in self.lease.record.commits(self.run_, "checkpoints")]
        place = data.draw(st.sampled_from(whole))
        if len(set(whole) - self.damaged) <= 1:
            return  # the last intact one must never be lost
        self.store.put(f"run/{place}/state", b"something else")
        self.damaged.add(place)

    @rule()
    def restart(self) -> None:
        self.lease.release()
        self._start()

    @rule()
    def a_stale_writer_wakes_up(self) -> None:
        stale = self.lease
        self.lease.release()
        self._start()
        place = checkpoint_at(self.step + 50, stale.record.attempt).folder
        source = self.folder / "stale"
        source.mkdir(exist_ok=True)
        (source / "state").write_bytes(b"of a job that should be dead")
        commit(self.store, f"run/{place}", source, self.run_.settings.fingerprint("train"))

    @invariant()
    def what_was_deleted_had_two_newer_ones(self) -> None:
        if not hasattr(self, "lease"):
            return
        present = set(self.lease.record.commits(self.run_, "checkpoints"))
        for deleted in self.there - present:
            newer = [found for found in self.there & present if found > deleted]
            assert len(newer) >= 2, f"{deleted} was deleted, and only {newer} were newer"
        self.there &= present

    @invariant()
    def a_start_would_go_on_from_the_newest_whole_one(self) -> None:
        if not hasattr(self, "lease"):
            return
        counting = self.lease.record.commits(self.run_, "checkpoints")
        whole = [found for found in counting if found.folder not in self.damaged]
        probe = replace(self.run_, paths=Paths(self.folder / "probe", "run"))
        restored = restore_newest(probe, self.lease.record, lambda text: None)
        assert restored.step == (step_of(whole[0]) if whole else None)
        if whole and whole[0].folder in self.contents:
            data = (probe.paths.checkpoints_dir / f"checkpoint-{restored.step}" / "state").read_bytes()
            assert data == self.contents[whole[0].folder]


Checkpoints.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestRetention = Checkpoints.TestCase
