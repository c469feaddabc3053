"""The nodes of one run that train together: who is there, when to begin, and who has gone.

They meet in the store, where each node keeps one small record, `nodes/attempt-0003/node-0001.json`, and writes it anew
every few seconds. So no node needs to know another's address before the first announces it, a node that was replaced
needs no introduction, and a machine that lost its power, which no socket tells of, is missed all the same. An attempt is
one gang: whoever leaves it ends it, with exit code 75 on all nodes, and the next attempt gathers anew.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from job.checkpoints.lease import Commit, LeaseRecord
from job.cluster import free_port, node_name, own_address
from job.errors import ExitCode, JobError, TransientError, from_os_error
from job.nodes.record import DEAD_SECONDS, NodeRecord, Peer, parse
from job.run import Run

BEAT_SECONDS = 3.0
_ABSENT_SECONDS = 900.0  # until a node that never came is given up
_SKEW_SECONDS = 5.0  # between the clocks of two nodes that start together
_LAST_WORDS_SECONDS = 3 * BEAT_SECONDS


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes' processes meet, and under which name, so that no process of another attempt joins."""

    endpoint: str  # host:port
    id: str


class Gang:
    """This node's part: its own record, and those of the nodes that it listens to.

    The first node listens to all others, each of them to the first. `wait` is called between looks, and raises if the
    start is to end.
    """

    def __init__(self, run: Run, wait: Callable[[], None], say: Callable[[str], None]) -> None:
        self._run, self._wait, self._say = run, wait, say
        self._began = time.time()
        others = range(1, run.node.count) if run.node.leads else (0,)
        self._peers = {index: Peer(index) for index in others}
        self._record = NodeRecord(run.node.index, node_name(), uuid.uuid4().hex)
        self._attempt = 0
        self._members: tuple[str, ...] = ()
        self._moved_at = self._looked_at = time.monotonic()
        self._on_lost: Callable[[JobError], None] | None = None
        self._lock, self._over = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._beat_until_over, name="gang", daemon=True)

    # -- the first node ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def led(self, attempt: int) -> Iterator[None]:
        """Within this, beat as the first node of an attempt; what ends it is told to the others."""
        self._join(attempt)
        self._thread.start()
        with self._ended():
            yield

    def gather(self) -> None:
        """Wait until every other node is ready; raises what ended one that is not coming."""
        began, told = time.monotonic(), 0.0
        while missing := [index for index, peer in self._peers.items() if not peer.is_ready]:
            for index in missing:
                self._refuse_ended(index)
                peer = self._peers[index]
                if not peer.alive and min(time.monotonic() - began, peer.silent_seconds) > _ABSENT_SECONDS:
                    raise TransientError(
                        f"Node {index} of {self._run.node.count} did not come within {_ABSENT_SECONDS / 60:.0f} minutes.",
                        self._how_to_meet(),
                    )
            if time.monotonic() - told > 60:
                told = time.monotonic()
                self._say(f"Waiting for {_nodes(missing)} of {self._run.node.count} to be ready.")
            self._wait()

    def announce(self, resume: Commit | None) -> Rendezvous:
        """Tell the others that the training begins, from which checkpoint, and where."""
        settings = self._run.settings
        address = own_address() if settings.master_addr == "auto" else settings.master_addr
        port = free_port() if settings.master_port == "auto" else settings.master_port
        members = [self._record.holder, *(peer.record.holder for peer in self._peers.values() if peer.record)]
        folder = resume.folder if resume is not None else None
        self._members = tuple(members)
        self._tell(state="training", members=tuple(members), endpoint=f"{address}:{port}", resume=folder)
        return self._rendezvous(self._record)

    # -- the other nodes --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Within this, beat in whatever attempt the lease in the store names; what ends it is told to the first node."""
        self._thread.start()
        with self._ended():
            yield

    def await_announcement(self, trained: Callable[[], bool]) -> tuple[Rendezvous, str | None] | None:
        """Wait for the first node to begin the training with this start among its members: where to meet, and the folder
        of the checkpoint to go on from. None once `trained` says that there is nothing to train any more.
        """
        self._tell(state="ready")
        began, told = time.monotonic(), 0.0
        while True:
            first = self._peers[0]  # of the attempt that is at work now
            record = first.record
            if (
                first.alive
                and record is not None
                and record.state == "training"
                and self._record.holder in record.members
            ):
                self._members = record.members
                self._tell(state="training")
                return self._rendezvous(record), record.resume
            if trained():
                return None
            self._refuse_ended(0)
            if not first.alive and min(time.monotonic() - began, first.silent_seconds) > _ABSENT_SECONDS:
                raise TransientError("The first node did not come.", self._how_to_meet())
            if time.monotonic() - told > 60:
                told = time.monotonic()
                self._say("Waiting for the first node to begin the training.")
            self._wait()

    def await_commit(self, trained: Callable[[], bool]) -> None:
        """Wait until the first node has stored what was trained; raises if it ended without."""
        while not trained():
            peer = self._peers[0]
            if peer.has_ended and not trained():
                raise peer.ending()
            if peer.silent_seconds > DEAD_SECONDS:
                raise TransientError(
                    f"{peer.described} fell silent before it had stored the adapter.", "Start the job again."
                )
            self._wait()

    # -- all of them ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watched(self, on_lost: Callable[[JobError], None]) -> Iterator[None]:
        """Within this, a node that ends or falls silent is told to `on_lost`, from another thread."""
        self._on_lost = on_lost
        try:
            yield
        finally:
            self._on_lost = None

    def moved(self) -> None:
        """The training has taken a step, which it cannot without all of its nodes."""
        self._moved_at = time.monotonic()

    def why(self, own: JobError) -> JobError:
        """What ended the training on this node: its `own` error, or that of the node which made it fail.

        Another node's end reaches this one first as a lost connection, and its record a moment later.
        """
        if own.exit_code not in (ExitCode.TRY_AGAIN, ExitCode.NODE_UNFIT):
            return own
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            for peer in self._peers.values():
                if peer.has_ended:
                    return peer.ending() if peer.failed else own
            self._over.wait(BEAT_SECONDS / 3)
            self._look()
        return own

    # -- underneath -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        error: JobError | None = JobError("Its process was ended.")
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

    def _end(self, error: JobError | None) -> None:
        """The last record of this start; a failure to write it only makes the others wait."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # it never began
            self._thread.join(timeout=BEAT_SECONDS)
        if error is not None and error.exit_code != ExitCode.TRY_AGAIN and not self._run.node.leads:
            self._await_hearing()
        if self._attempt:
            code = int(error.exit_code) if error else int(ExitCode.OK)
            message, hint = (error.message, error.hint) if error else ("", "")
            self._tell(state="ended", exit_code=code, message=message, hint=hint)

    def _await_hearing(self) -> None:
        """A first node that has not begun yet must hear why this one is not coming: it would wait for long."""
        deadline = time.monotonic() + DEAD_SECONDS
        while not (self._attempt and self._peers[0].alive) and time.monotonic() < deadline:
            self._follow_lease()
            if self._attempt:
                self._look()
            time.sleep(BEAT_SECONDS / 3)

    def _how_to_meet(self) -> str:
        return (
            f"Check that every node runs, with FT_RUN_ID={self._run.id} and FT_NNODES={self._run.node.count}, and reaches the store "
            f"{self._run.store.url}; then start the job again on all of them."
        )

    def _rendezvous(self, record: NodeRecord) -> Rendezvous:
        return Rendezvous(record.endpoint, f"{self._run.id}-{self._attempt}")

    def _join(self, attempt: int) -> None:
        with self._lock:
            self._attempt = attempt
            self._record = replace(self._record, state="preparing" if self._run.node.leads else self._record.state)
            for index in self._peers:
                self._peers[index] = Peer(index)

    def _tell(self, **news: object) -> None:
        with self._lock:
            self._record = replace(self._record, beat=self._record.beat + 1, written=time.time(), **news)  # type: ignore[arg-type]
            if self._attempt:
                with contextlib.suppress(JobError, OSError):  # the next beat says it too
                    self._run.store.put(self._key(self._record.node), json.dumps(asdict(self._record)).encode())

    def _key(self, index: int) -> str:
        return f"{self._run.id}/nodes/attempt-{self._attempt:04d}/node-{index:04d}.json"

    def _beat_until_over(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # a dead thread would be taken for a dead node
                self._beat()
            if self._over.wait(BEAT_SECONDS):
                return

    def _beat(self) -> None:
        if not self._run.node.leads:
            self._follow_lease()
        if not self._attempt or self._over.is_set():
            return
        self._tell()
        seen, now = self._look(), time.monotonic()
        blind = now - self._looked_at - (2 * BEAT_SECONDS if seen else 0)  # a store that took its time tells nothing
        self._looked_at = now
        for peer in self._peers.values():
            peer.unseen(max(0.0, blind))
        if seen:
            self._judge()

    def _follow_lease(self) -> None:
        """Go over to the attempt that is at work now; in the middle of a training that is the end of ours."""
        with contextlib.suppress(JobError, OSError):
            lease = LeaseRecord.read(self._run)
            attempt = lease.attempt
            if attempt == self._attempt or (lease.released and not self._attempt):  # that attempt is over
                return
            if self._record.state == "training":
                self._lose(TransientError("The first node has started anew.", "Start the job again."))
            else:
                self._join(attempt)

    def _look(self) -> bool:
        """Read the others' records; False if the store could not be read."""
        with self._lock:
            peers = dict(self._peers)
        for index, peer in peers.items():
            try:
                peer.seen(parse(self._run.store.get(self._key(index))))
            except FileNotFoundError:
                peer.seen(None)
            except (JobError, OSError):
                return False
        return True

    def _judge(self) -> None:
        if self._record.state != "training":
            return
        moves = time.monotonic() - self._moved_at < DEAD_SECONDS / 2
        for peer in self._peers.values():
            if peer.record is not None and peer.record.holder not in self._members:
                self._lose(TransientError(f"{peer.described} has started anew.", "Start the job again."))
            elif peer.has_ended and peer.silent_seconds > _LAST_WORDS_SECONDS and not peer.succeeded:
                self._lose(peer.ending())
            elif not peer.has_ended and peer.silent_seconds > DEAD_SECONDS and not moves:
                self._lose(
                    TransientError(
                        f"{peer.described} has not been heard of for {DEAD_SECONDS:.0f} s.",
                        "Start the job again: it goes on from the last checkpoint.",
                    )
                )

    def _lose(self, reason: JobError) -> None:
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost(reason)

    def _refuse_ended(self, index: int) -> None:
        """Raise for a node that ended while this one waits for it: under Slurm no new start of it would follow."""
        peer = self._peers[index]
        fresh = peer.record is not None and peer.record.written > self._began - _SKEW_SECONDS
        if peer.has_ended and not peer.succeeded and fresh:  # else it is what an earlier start left behind
            raise peer.ending()


def _nodes(indices: list[int]) -> str:
    return ("node " if len(indices) == 1 else "nodes ") + ", ".join(map(str, indices))
