"""What one node tells the others through the store, and how it looks to them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields

from job.errors import ExitCode, JobError, from_code

DEAD_SECONDS = 30.0  # without a beat, while the store can be read, until a node counts as dead
CONTAGIOUS = (ExitCode.BAD_INPUT, ExitCode.BUG, ExitCode.PERMISSION, ExitCode.SETTINGS)


@dataclass(frozen=True)
class NodeRecord:
    """What one node tells the others. The first node adds the last three fields when training can start."""

    node: int
    name: str
    holder: str  # one start of the job on that node
    beat: int = 0
    written: float = 0.0  # seconds since the epoch, by that node's clock
    state: str = "preparing"  # → ready → training → ended
    exit_code: int | None = None
    message: str = ""
    hint: str = ""
    processes: int = 1  # that train on this node
    members: tuple[str, ...] = ()  # the holders, in the order of the nodes
    ranks: tuple[int, ...] = ()  # processes of each node, in the same order
    endpoint: str = ""  # host:port where the ranks meet
    every_seconds: float = 0.0  # between two of its beats
    resume: str | None = None  # the commit to resume from: a folder of the run in the store


class OtherNode:
    """Another node, as its record in the store shows it."""

    def __init__(self, index: int) -> None:
        self._index = index
        self.record: NodeRecord | None = None
        self._changed_at = time.monotonic()
        self._changes = 0

    @property
    def alive(self) -> bool:
        """Whether its record has been seen to change. A dead start's record stays as it was."""
        return self._changes > 1 and self.silent_seconds < self.dead_seconds

    @property
    def dead_seconds(self) -> float:
        """How long it may be silent. It beats less often where every beat leaves a version that is paid for."""
        return max(DEAD_SECONDS, 4 * self.record.every_seconds if self.record is not None else 0.0)

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self._changed_at

    @property
    def is_ready(self) -> bool:
        return self.alive and self.record is not None and self.record.state == "ready"

    @property
    def has_ended(self) -> bool:
        return self.record is not None and self.record.state == "ended"

    @property
    def succeeded(self) -> bool:
        return self.record is not None and self.record.exit_code == ExitCode.OK

    @property
    def failed(self) -> bool:
        """Whether it ended with an error that every node would meet."""
        return self.has_ended and self.record is not None and self.record.exit_code in CONTAGIOUS

    @property
    def described(self) -> str:
        """Its name in the scheduler, once that is known."""
        return f"Node {self._index} ({self.record.name})" if self.record is not None else f"Node {self._index}"

    def ending(self) -> JobError:
        """Its error, to raise on this node. One that every node would meet keeps its code. Others are worth a retry."""
        assert self.record is not None and self.record.exit_code is not None
        code = self.record.exit_code if self.record.exit_code in CONTAGIOUS else ExitCode.TRY_AGAIN
        message = f"{self.described} ended with exit code {self.record.exit_code}: {self.record.message}"
        return from_code(code, message, self.record.hint)

    def seen(self, record: NodeRecord | None) -> None:
        """Take note of what its record says now."""
        if record is not None and record != self.record:
            if self.record is None or record.holder != self.record.holder:
                self._changes = 0
            self.record, self._changed_at = record, time.monotonic()
            self._changes += 1

    def unseen(self, seconds: float) -> None:
        """The store could not be read for this long, which says nothing about the node."""
        self._changed_at += seconds


def parse(data: bytes) -> NodeRecord | None:
    """A record as it is in the store; None for anything that is not one."""
    try:
        raw = json.loads(data)
        known = {field.name for field in fields(NodeRecord)}
        found = {name: value for name, value in raw.items() if name in known}
        return NodeRecord(
            **found | {"members": tuple(found.get("members", ())), "ranks": tuple(found.get("ranks", ()))}
        )
    except (ValueError, TypeError, AttributeError):
        return None
