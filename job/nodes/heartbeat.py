"""A node's heartbeat: the record it keeps in the store for the others, and what their records say of them.

Each node rewrites one small record, `nodes/attempt-0003/node-0001.json`, every few seconds. So no node needs another's
address before the first announces it, and a replaced node needs no introduction. A machine that lost power is
noticed too, although no socket reports it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace

from job.checkpoints.lease import LeaseRecord
from job.cluster import node_name
from job.errors import ExitCode, JobError, TransientError, from_os_error
from job.nodes.record import DEAD_SECONDS, NodeRecord, OtherNode, parse
from job.run import Run

BEAT_SECONDS = 3.0
VERSIONED_BEAT_SECONDS = 15.0
_SKEW_SECONDS = 5.0  # between the clocks of two nodes that start together
_LAST_WORDS_SECONDS = 3 * BEAT_SECONDS


class Heartbeat:
    """This node's record, and those of the nodes it listens to. The first node listens to all others, and they to it.

    The beat runs in its own thread. While `watched`, it reports a node that exited or fell silent.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._started = time.time()
        others = range(1, run.node.count) if run.node.leads else (0,)
        self.others = {index: OtherNode(index) for index in others}
        self.record = NodeRecord(run.node.index, node_name(), uuid.uuid4().hex, processes=run.processes_per_node)
        self.attempt = 0
        self.members: tuple[str, ...] = ()
        self._moved_at = self._looked_at = self._told_at = time.monotonic()
        self._on_lost: Callable[[JobError], None] | None = None
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_until_over, name="heartbeat", daemon=True)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Beat within this block. The last record says how the block ended."""
        self._thread.start()
        error: JobError | None = JobError("Its process was killed.")
        try:
            yield
            error = None
        except JobError as raised:
            error = raised
            raise
        except Exception as raised:
            error = from_os_error(raised) or JobError(f"{type(raised).__name__}: {raised}")
            raise
        finally:
            self._end(error)

    @contextlib.contextmanager
    def watched(self, on_lost: Callable[[JobError], None]) -> Iterator[None]:
        """Within this block, call `on_lost` from the beat's thread when a node exits or falls silent."""
        self._on_lost = on_lost
        try:
            yield
        finally:
            self._on_lost = None

    def moved(self) -> None:
        """Training has taken a step, which needs all nodes."""
        self._moved_at = time.monotonic()

    def join(self, attempt: int) -> None:
        """Keep the record in this attempt from now on, and forget what was heard in earlier ones."""
        with self._lock:
            self.attempt = attempt
            self.record = replace(self.record, state="preparing" if self._run.node.leads else self.record.state)
            for index in self.others:
                self.others[index] = OtherNode(index)

    def tell(self, **news: object) -> None:
        """Change this node's record and write it. A failure to write is left to the next beat."""
        with self._lock:
            every = VERSIONED_BEAT_SECONDS if self._run.store.keeps_versions else BEAT_SECONDS
            now = {"beat": self.record.beat + 1, "written": time.time(), "every_seconds": every}
            self.record, self._told_at = replace(self.record, **{**now, **news}), time.monotonic()  # type: ignore[arg-type]
            if self.attempt:
                with contextlib.suppress(JobError, OSError):
                    self._run.store.put(self._key(self.record.node), json.dumps(asdict(self.record)).encode())

    def refuse_ended(self, index: int) -> None:
        """Raise for a node that exited while this one waits for it: under Slurm it would not be started again."""
        other = self.others[index]
        fresh = other.record is not None and other.record.written > self._started - _SKEW_SECONDS
        if other.has_ended and not other.succeeded and fresh:  # an older record is an earlier start's
            raise other.ending()

    def why(self, own: JobError) -> JobError:
        """What ended training on this node: its `own` error, or that of the node that caused it.

        Another node's exit is first seen as a lost connection. Its record follows a moment later.
        """
        if own.exit_code not in (ExitCode.TRY_AGAIN, ExitCode.NODE_UNFIT):
            return own
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            for other in self.others.values():
                if other.has_ended:
                    return other.ending() if other.failed else own
            self._over.wait(BEAT_SECONDS / 3)
            self._look()
        return own

    # -- the end ----------------------------------------------------------------------------------------------------

    def _end(self, error: JobError | None) -> None:
        """Write the last record of this start. A failure to write it only makes the others wait."""
        self._over.set()
        self._thread.join(timeout=BEAT_SECONDS)
        if error is not None and error.exit_code != ExitCode.TRY_AGAIN and not self._run.node.leads:
            self._await_hearing()
        if self.attempt:
            code = int(error.exit_code) if error else int(ExitCode.OK)
            message, hint = (error.message, error.hint) if error else ("", "")
            self.tell(state="ended", exit_code=code, message=message, hint=hint)

    def _await_hearing(self) -> None:
        """Wait for a first node that has not started yet. Unless it hears why this one is not coming, it waits long."""
        deadline = time.monotonic() + DEAD_SECONDS
        while not (self.attempt and self.others[0].alive) and time.monotonic() < deadline:
            self._follow_lease()
            if self.attempt:
                self._look()
            time.sleep(BEAT_SECONDS / 3)

    # -- the beat ---------------------------------------------------------------------------------------------------

    def _key(self, index: int) -> str:
        return f"{self._run.id}/nodes/attempt-{self.attempt:04d}/node-{index:04d}.json"

    def _beat_until_over(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # if this thread died, the others would take the node for dead
                self._beat()
            if self._over.wait(BEAT_SECONDS):
                return

    def _beat(self) -> None:
        if not self._run.node.leads:
            self._follow_lease()
        if not self.attempt or self._over.is_set():
            return
        if not self._run.store.keeps_versions or time.monotonic() - self._told_at > VERSIONED_BEAT_SECONDS:
            self.tell()
        seen, now = self._look(), time.monotonic()
        blind = now - self._looked_at - (2 * BEAT_SECONDS if seen else 0)  # a slow store says nothing about the nodes
        self._looked_at = now
        for other in self.others.values():
            other.unseen(max(0.0, blind))
        if seen:
            self._judge()

    def _follow_lease(self) -> None:
        """Join the attempt that holds the lease. During training, a new attempt ends ours."""
        with contextlib.suppress(JobError, OSError):
            lease = LeaseRecord.read(self._run)
            attempt = lease.attempt
            if attempt == self.attempt or (lease.released and not self.attempt):  # that attempt is over
                return
            if self.record.state == "training":
                self._lose(TransientError("The first node has started again.", "Start the job again."))
            else:
                self.join(attempt)

    def _look(self) -> bool:
        """Read the others' records; False if the store could not be read."""
        with self._lock:
            others = dict(self.others)
        for index, other in others.items():
            try:
                other.seen(parse(self._run.store.get(self._key(index))))
            except FileNotFoundError:
                other.seen(None)
            except (JobError, OSError):
                return False
        return True

    def _judge(self) -> None:
        """Report a node that training can no longer count on."""
        if self.record.state != "training":
            return
        unmoved = time.monotonic() - self._moved_at
        for other in self.others.values():
            if other.record is not None and other.record.holder not in self.members:
                self._lose(TransientError(f"{other.described} has started again.", "Start the job again."))
            elif other.has_ended and other.silent_seconds > _LAST_WORDS_SECONDS and not other.succeeded:
                self._lose(other.ending())
            elif not other.has_ended and other.silent_seconds > other.dead_seconds and unmoved > other.dead_seconds / 2:
                self._lose(
                    TransientError(
                        f"{other.described} has not been heard from for {other.dead_seconds:.0f} s.",
                        "Start the job again: it resumes from the last checkpoint.",
                    )
                )

    def _lose(self, reason: JobError) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost(reason)
