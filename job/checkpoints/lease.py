"""The lease of a run: only one attempt may write at a time, and the lease says which commits count.

Every start of a run that has work to do is an attempt, numbered one higher than the last. It takes the lease by a
conditional write, renews it, and writes only below `attempt-NNNN`, so two attempts never touch the same object. Taking
the lease also records which manifests count at that moment. An older attempt that was suspended or cut off may commit
later without knowing, but that commit does not count. So the order of writes to one small object decides, never a
clock. Clocks only decide how long a newcomer waits for a holder that may still be alive.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from job.checkpoints.folder_lock import FolderLock
from job.checkpoints.manifest import MANIFEST
from job.errors import InputError, JobError, Stopped, TransientError
from job.guard.secrets import masked, secret_values
from job.run import Run
from job.storage import Conflict

RENEW_SECONDS, EXPIRE_SECONDS = 5.0, 30.0
# where every renewal leaves a version that is paid for: 5,760 a day instead of 17,280
VERSIONED_RENEW_SECONDS, VERSIONED_EXPIRE_SECONDS = 15.0, 60.0
_KEY = re.compile(r"(?P<artefact>.+)/attempt-(?P<attempt>\d{4,})/(?P<file>.+)")


class Superseded(TransientError):
    """A later attempt holds the lease, so this one must not write anymore."""


@dataclass(frozen=True, order=True)
class Commit:
    """A manifest in the store: its artefact, such as `checkpoints/step-00000120`, and the attempt that wrote it."""

    artefact: str
    attempt: int

    @property
    def folder(self) -> str:
        """The folder of its files, relative to the run."""
        return f"{self.artefact}/attempt-{self.attempt:04d}"


@dataclass(frozen=True)
class LeaseRecord:
    """The content of lease.json. The defaults describe a run that has not started."""

    attempt: int = 0
    holder: str = ""
    host: str = ""
    renewed: float = 0.0  # seconds since the epoch, by the holder's clock
    released: bool = True
    inherited: tuple[str, ...] = ()
    boot: str = ""  # of the holder's kernel, whose locks say whether it is alive
    expires_seconds: float = EXPIRE_SECONDS  # without a renewal, by the store's clock
    idle: int = 0  # attempts in a row, before this one, that committed nothing new
    ended: str = ""  # how the attempt ended; for a new one, how the last one did
    exit_code: int | None = None  # None until the attempt ends, and for good if it was killed
    unsaved_seconds: float = 0.0  # of training since the last checkpoint that counts, when the lease was last written

    @classmethod
    def read(cls, run: Run) -> LeaseRecord:
        """Read the record without taking the lease."""
        return _read(run)[0]

    def commits(self, run: Run, below: str) -> list[Commit]:
        """The commits that count below a folder of the run: last artefact first, its newest attempt first."""
        inherited = set(self.inherited)
        found = (
            commit
            for commit in every_commit(run, below)
            if commit.folder in inherited or commit.attempt == self.attempt
        )
        return sorted(found, reverse=True)


SHARED = "stages/prepare/"  # what a store keeps for other machines' convenience only


class Lease:
    """The lease, held by this process until `release`. `record` says which commits count."""

    def __init__(self, run: Run, lock: FolderLock, record: LeaseRecord, version: str) -> None:
        self._run, self._folder_lock, self._version = run, lock, version
        self._writing, self._ended = threading.RLock(), threading.Event()
        self.record, self.former = record, LeaseRecord()
        self._unsaved_seconds: Callable[[], float] = lambda: 0.0

    @classmethod
    def take(cls, run: Run, say: Callable[[str], None], stop_requested: Callable[[], bool]) -> Lease:
        """Become the next attempt. Waits for a holder that may be alive, and raises TransientError if it is."""
        lock = FolderLock(run.paths.lock_file)
        try:
            former, version = _await_end(run, lock, say, stop_requested)
            if not version:  # the lease is missing or was deleted, so every commit counts
                commits = list(every_commit(run, ""))
                attempt = max((commit.attempt for commit in commits), default=0)
                former = replace(former, attempt=attempt, inherited=tuple(commit.folder for commit in commits))
            inherited = [commit.folder for commit in former.commits(run, "")]
            # prepared rows are no work that another start could not repeat
            new = {folder for folder in inherited if not folder.startswith(SHARED)} - set(former.inherited)
            record = LeaseRecord(
                former.attempt + 1, lock.holder, socket.gethostname(), time.time(), False, tuple(inherited), lock.boot,
                _pace(run)[1], former.idle + 1 if former.attempt and not new else 0, former.ended,
            )  # fmt: skip
            lease = cls(run, lock, record, version)
            lease.former = former
            lease._write(record)
            # The former holder may have committed between our listing and our write. That commit is valid.
            inherited = [commit.folder for commit in former.commits(run, "")]
            if tuple(inherited) != record.inherited:
                lease._write(replace(record, inherited=tuple(inherited)))
        except BaseException:
            lock.close()
            raise
        return lease

    def keep_alive(
        self, on_lost: Callable[[Superseded], None], unsaved_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Renew the lease in a background thread, which calls `on_lost` at most once.

        Each time `unsaved_seconds` is noted, so that the next attempt knows what this one lost if it is killed.
        """
        self._unsaved_seconds = unsaved_seconds
        threading.Thread(target=self._renew_until_ended, args=(on_lost,), name="lease", daemon=True).start()

    def renew(self) -> None:
        """Prove that the lease is still ours. Raises Superseded if it is not."""
        with self._writing:
            expires, unsaved = _pace(self._run)[1], self._unsaved_seconds()
            self._write(replace(self.record, renewed=time.time(), expires_seconds=expires, unsaved_seconds=unsaved))

    def release(self, ended: str = "", *, final: bool = False, exit_code: int | None = None) -> None:
        """Let the next attempt start immediately, and know how this one ended. If this fails, it only has to wait.

        A `final` ending, a success or an error that no scheduler retries, sets the count of idle attempts back.
        """
        self._ended.set()
        with self._writing:
            with contextlib.suppress(JobError, OSError):
                idle = -1 if final else self.record.idle
                record = replace(self.record, released=True, ended=masked(ended, secret_values())[:500], idle=idle)
                self._write(replace(record, exit_code=exit_code, unsaved_seconds=self._unsaved_seconds()))
            self._folder_lock.close()

    def _renew_until_ended(self, on_lost: Callable[[Superseded], None]) -> None:
        while not self._ended.wait(_pace(self._run)[0]):
            try:
                self.renew()
            except Superseded as error:
                if not self._ended.is_set():
                    on_lost(error)
                return
            except Exception:  # noqa: S112 (the store is unreachable, so nobody can commit anything meanwhile)
                continue

    def _write(self, record: LeaseRecord) -> None:
        data, key = json.dumps(asdict(record), indent=1).encode(), f"{self._run.id}/lease.json"
        try:
            if self._version:
                self._version = self._run.store.put_if_unchanged(key, data, self._version)
            else:
                self._run.store.put_if_absent(key, data)
                there, self._version = _read(self._run)
                if there.holder != record.holder:  # we were suspended in between, for a long time
                    raise Conflict(key)
            self.record = record
        except Conflict:
            # Either another attempt wrote it, or we did and the response was lost.
            there, version = _read(self._run)
            if there.holder != record.holder:
                raise Superseded(
                    f"Attempt {there.attempt} of run {self._run.id!r}, on {there.host or 'another machine'}, has taken over from "
                    f"attempt {record.attempt}.",
                    "If that is a restart of this job, there is nothing to do. Otherwise run only one job per FT_RUN_ID.",
                ) from None
            self._version = version
            if there != record:
                self._write(record)
            self.record = record


def _pace(run: Run) -> tuple[float, float]:
    """Seconds between two renewals, and without any until the lease has expired."""
    if run.store.keeps_versions:
        return VERSIONED_RENEW_SECONDS, VERSIONED_EXPIRE_SECONDS
    return RENEW_SECONDS, EXPIRE_SECONDS


def _await_end(
    run: Run, lock: FolderLock, say: Callable[[str], None], stop_requested: Callable[[], bool]
) -> tuple[LeaseRecord, str]:
    """Wait until the holder has released the lease, is dead, or has not renewed it for long enough. Returns it.

    Only the store's clock says how long that is: the holder's and ours may differ by any amount.
    """
    record, version = first = _read(run)
    began = time.monotonic()
    while not (record.released or lock.has_died(record.holder, record.boot) or _age(run) > record.expires_seconds):
        if time.monotonic() - began > record.expires_seconds:
            if (record, version) == first:
                break  # the store's clock is of no use, but the lease was not renewed while we watched
            raise TransientError(
                f"Attempt {record.attempt} of run {run.id!r} is still working on {record.host}.",
                "Wait for it or stop it. To train something else, set another FT_RUN_ID.",
            )
        if (record, version) == first and time.monotonic() - began < 1:
            say(
                f"Attempt {record.attempt}, on {record.host}, may still be alive. "
                f"Waiting up to {record.expires_seconds:.0f} s for it."
            )
        if stop_requested():
            raise Stopped("Stopped, as requested.", "Start the job again.")
        time.sleep(1)
        record, version = _read(run)
    return record, version


def _age(run: Run) -> float:
    try:
        return run.store.age_seconds(f"{run.id}/lease.json")
    except FileNotFoundError:
        return 0.0


def _read(run: Run) -> tuple[LeaseRecord, str]:
    try:
        data, version = run.store.get_with_version(f"{run.id}/lease.json")
    except FileNotFoundError:
        return LeaseRecord(), ""
    try:
        return _record_of(json.loads(data)), version
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # it is written whole, or not at all
        raise InputError(
            f"{run.store.url}/{run.id}/lease.json is not what this job writes there.",
            "If no other job of this run is running, delete that object and start again. Every commit will then count.",
        ) from None


def _record_of(found: dict[str, Any]) -> LeaseRecord:
    """Raises ValueError, TypeError, KeyError or AttributeError if a field has another type."""
    fields: dict[str, Any] = {"inherited": tuple(found["inherited"])}
    if not all(type(folder) is str for folder in fields["inherited"]):
        raise TypeError("inherited")
    for name, usual in asdict(LeaseRecord()).items():
        value = found.get(name, usual)
        if name == "inherited" or value == usual:
            continue
        if isinstance(usual, float) and type(value) is int:
            value = float(value)
        if type(value) is not (int if usual is None else type(usual)):
            raise TypeError(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(name)
        fields[name] = value
    return LeaseRecord(**fields)


def every_commit(run: Run, below: str) -> Iterator[Commit]:
    """Every commit below a folder of the run, whether it counts or not."""
    return (commit for commit, _, file in written(run, below) if file == MANIFEST)


def written(run: Run, below: str) -> Iterator[tuple[Commit, str, str]]:
    """Every object that any attempt wrote below a folder of the run, as (commit, key, file). The commit may be unfinished."""
    for key, _ in run.store.list(f"{run.id}/{below}".rstrip("/")):
        match = _KEY.fullmatch(key.removeprefix(f"{run.id}/"))
        if match:
            yield Commit(match["artefact"], int(match["attempt"])), key, match["file"]
