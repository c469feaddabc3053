"""Trees of messages, as OpenAssistant publishes them, taken apart into the conversations with the best answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from job.data.files.batch import Batch, Malformed, Row
from job.data.files.batch import batches as grouped

Reply = Mapping[str, Any]


def threads(rows: Sequence[tuple[Any, Row]]) -> Iterator[tuple[Any, list[Row]]]:
    """One conversation for each tree: from its root, at every step the reply that people ranked best.

    `rows` are (place, row) with `message_id`, `parent_id`, `rank`. Yields the place of each root with its messages.
    An unanswered question at the end is left out. Köpf et al. 2023 (arXiv:2304.07327), section 3.
    """
    replies: dict[Any, list[Row]] = {}
    for _, row in rows:
        if row.get("parent_id") is not None and not row.get("deleted"):
            replies.setdefault(row["parent_id"], []).append(row)
    for place, row in rows:
        if row.get("parent_id") is None and not row.get("deleted"):
            yield place, _thread(row, lambda message: replies.get(message.get("message_id"), []))


def nested_thread(root: Reply) -> list[Row]:
    """The conversation of a tree whose messages hold their `replies`."""
    return _thread(root, lambda message: [reply for reply in message.get("replies") or () if not reply.get("deleted")])


def _thread(root: Row, replies_to: Any) -> list[Row]:
    messages, seen = [root], {root.get("message_id")}
    while found := [reply for reply in replies_to(messages[-1]) if reply.get("message_id") not in seen]:
        messages.append(min(found, key=_rank))
        seen.add(messages[-1].get("message_id"))
        if len(messages) > 1000:
            break
    while messages and messages[-1].get("role") not in ("assistant", "bot", "gpt"):
        messages.pop()
    return messages


def _rank(reply: Row) -> float:
    """Rank 0 is the best. Replies that nobody ranked come last, in the order in which they are listed."""
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")


def gathered(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches with one row for each tree, at the place of its root: `thread`, a list of messages. Reads all rows first."""
    rows: list[tuple[tuple[str, str, int], Row]] = []
    broken: list[tuple[tuple[str, str, int], Malformed]] = []
    for batch in batches:
        for number, row in batch.rows():
            place = (batch.file, batch.unit, number)
            if isinstance(row, Malformed):
                broken.append((place, row))
            else:
                rows.append((place, {name: row.get(name) for name in _USED}))
    found: list[tuple[tuple[str, str, int], Row | Malformed]] = [
        (place, {"thread": thread}) for place, thread in threads(rows)
    ]
    for (file, unit), group in groupby([*found, *broken], key=lambda item: item[0][:2]):
        yield from grouped(file, ((place[2], row) for place, row in group), unit, size=lambda _: 2000)


_USED = ("message_id", "parent_id", "text", "role", "rank", "deleted")
