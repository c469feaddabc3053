"""How the nodes of one run agree to train together: the first gathers the others and announces where they meet.

They meet in the store, through their heartbeats. Nodes of one attempt stand and fall together: when one leaves, all
exit with code 75, and the next attempt gathers them again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from job.checkpoints.lease import Commit
from job.cluster import free_port, own_address
from job.errors import JobError, TransientError
from job.nodes.heartbeat import Heartbeat
from job.nodes.record import NodeRecord, OtherNode
from job.run import Run

_ABSENT_SECONDS = 900.0  # before giving up on a node that never started
_REMINDER_SECONDS = 60.0


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes' processes meet, and an id that keeps processes of other attempts out."""

    endpoint: str  # host:port
    id: str
    processes: tuple[int, ...]  # of each node, in their order


class Member:
    """This node among the nodes that train together: its heartbeat, and what ends training for all of them.

    `wait` is called repeatedly while this node waits. It raises if the start must end.
    """

    def __init__(self, run: Run, wait: Callable[[], None], say: Callable[[str], None]) -> None:
        self._run, self._wait, self._say = run, wait, say
        self.heartbeat = Heartbeat(run)

    def watched(self, on_lost: Callable[[JobError], None]) -> contextlib.AbstractContextManager[None]:
        """Within this block, call `on_lost` from another thread when a node exits or falls silent."""
        return self.heartbeat.watched(on_lost)

    def moved(self) -> None:
        """Training has taken a step, which needs all nodes."""
        self.heartbeat.moved()

    def why(self, own: JobError) -> JobError:
        """What ended training on this node: its `own` error, or that of the node that caused it."""
        return self.heartbeat.why(own)

    def _give_up_if_absent(self, other: OtherNode, since: float, message: str) -> None:
        if not other.alive and min(time.monotonic() - since, other.silent_seconds) > _ABSENT_SECONDS:
            raise TransientError(
                message,
                f"Check that every node runs, with FT_RUN_ID={self._run.id} and FT_NNODES={self._run.node.count}, and "
                f"reaches the store {self._run.store.url}. Then start the job again on all of them.",
            )

    def _meeting_place(self, record: NodeRecord) -> Rendezvous:
        return Rendezvous(record.endpoint, f"{self._run.id}-{self.heartbeat.attempt}", record.ranks)


class FirstNode(Member):
    """The node that gathers the others and says when training starts."""

    @contextlib.contextmanager
    def leading(self, attempt: int) -> Iterator[None]:
        """Beat as the first node of an attempt within this block. The others learn how it ended."""
        self.heartbeat.join(attempt)
        with self.heartbeat.beating():
            yield

    def gather(self) -> None:
        """Wait until every other node is ready. If one is not coming, raises what ended it."""
        started, reminder = time.monotonic(), _Reminder(self._say)
        count = self._run.node.count
        while missing := [index for index, other in self.heartbeat.others.items() if not other.is_ready]:
            for index in missing:
                self.heartbeat.refuse_ended(index)
                self._give_up_if_absent(
                    self.heartbeat.others[index],
                    started,
                    f"Node {index} of {count} did not start within {_ABSENT_SECONDS / 60:.0f} minutes.",
                )
            reminder.say(f"Waiting for {_nodes(missing)} of {count} to be ready.")
            self._wait()

    def announce(self, resume: Commit | None) -> Rendezvous:
        """Tell the others that training starts, from which checkpoint, and where."""
        settings, heartbeat = self._run.settings, self.heartbeat
        address = own_address() if settings.master_addr == "auto" else settings.master_addr
        port = free_port() if settings.master_port == "auto" else settings.master_port
        records = [heartbeat.record, *(other.record for other in heartbeat.others.values() if other.record)]
        heartbeat.members = tuple(record.holder for record in records)
        ranks = tuple(record.processes for record in records)
        folder = resume.folder if resume is not None else None
        heartbeat.tell(
            state="training", members=heartbeat.members, ranks=ranks, endpoint=f"{address}:{port}", resume=folder
        )
        return self._meeting_place(heartbeat.record)


class OtherMember(Member):
    """Any other node. It says that it is ready, and waits for the first node's announcement."""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Beat within this block, in the attempt that the store's lease names. The first node learns how it ended."""
        with self.heartbeat.beating():
            yield

    def await_announcement(self, trained: Callable[[], bool]) -> tuple[Rendezvous, str | None] | None:
        """Wait until the first node starts training with this start among its members.

        Returns where to meet and the folder of the checkpoint to resume from. Returns None once `trained` says that
        nothing is left to train.
        """
        heartbeat = self.heartbeat
        heartbeat.tell(state="ready")
        started, reminder = time.monotonic(), _Reminder(self._say)
        while True:
            first = heartbeat.others[0]  # of the attempt that is current now
            record = first.record
            announced = first.alive and record is not None and record.state == "training"
            if announced and record is not None and heartbeat.record.holder in record.members:
                heartbeat.members = record.members
                heartbeat.tell(state="training")
                return self._meeting_place(record), record.resume
            if trained():
                return None
            heartbeat.refuse_ended(0)
            self._give_up_if_absent(first, started, "The first node never started.")
            reminder.say("Waiting for the first node to start training.")
            self._wait()

    def await_commit(self, trained: Callable[[], bool]) -> None:
        """Wait until the first node has stored the adapter. Raises if it exited without doing so."""
        while not trained():
            first = self.heartbeat.others[0]
            if first.has_ended and not trained():
                raise first.ending()
            if first.silent_seconds > first.dead_seconds:
                raise TransientError(
                    f"{first.described} fell silent before it had stored the adapter.", "Start the job again."
                )
            self._wait()


class _Reminder:
    """Says a sentence immediately, and then at most once a minute."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said_at = say, -_REMINDER_SECONDS

    def say(self, text: str) -> None:
        if time.monotonic() - self._said_at > _REMINDER_SECONDS:
            self._said_at = time.monotonic()
            self._say(text)


def _nodes(indices: list[int]) -> str:
    return ("node " if len(indices) == 1 else "nodes ") + ", ".join(map(str, indices))
