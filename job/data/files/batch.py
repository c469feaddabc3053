"""A number of rows from one file: what a reader yields, and what a worker turns into tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

Row = Mapping[str, Any]

ROWS = 500  # per batch, at most; the number of workers never changes it
_BYTES = 1 << 20


class Malformed(ValueError):
    """A row does not match its format."""


class Damaged(Malformed):
    """A row of a broken file: no JSON, no text, or with too many fields. What the writer meant is lost."""


class LeftOut(Malformed):
    """A row says something that the chat template would leave out, so that another thing would be learned."""


@dataclass(frozen=True)
class FileOptions:
    """How files are to be read, where that is not for the file itself to say.

    `columns` are those that are needed, or None for all. `tell` receives a sentence about what was recognised.
    """

    encoding: str | None = None
    separator: str | None = None
    columns: frozenset[str] | None = None
    tell: Callable[[str], None] = field(default=lambda text: None)


@dataclass(frozen=True)
class Batch:
    """Rows of one file, each as unparsed JSON (bytes), a mapping, or a reason (`Malformed`) why it is none.

    Arrow data stays what it is. `numbers` count from 1: lines of JSON lines, CSV and text, rows of everything else.
    """

    file: str
    numbers: Sequence[int]
    content: Sequence[bytes | Row | Malformed] | pa.RecordBatch
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, number: int) -> str:
        return f"{self.file}, {self.unit} {number:,}"

    def rows(self) -> Iterator[tuple[int, Row | Malformed]]:
        """Each row, parsed, with its number."""
        if isinstance(self.content, pa.RecordBatch):
            yield from zip(self.numbers, map(without_nulls, _as_rows(self.content)), strict=True)
            return
        for number, value in zip(self.numbers, self.content, strict=True):
            yield number, parsed(value) if isinstance(value, bytes) else value

    def slice(self, first: int, last: int) -> Batch:
        """The rows from index `first` to before `last`."""
        content = self.content
        part = content.slice(first, last - first) if isinstance(content, pa.RecordBatch) else content[first:last]
        return Batch(self.file, self.numbers[first:last], part, self.unit)

    def only(self, indices: Sequence[int]) -> Batch:
        """The rows at these indices."""
        content = self.content
        if isinstance(content, pa.RecordBatch):
            part: Any = content.take(pa.array(indices, pa.int64()))
        else:
            part = [content[index] for index in indices]
        return Batch(self.file, [self.numbers[index] for index in indices], part, self.unit)


_NO_VALUE = (ValueError, OverflowError, pa.ArrowException)  # no UTF-8, a year after 9999, an unknown time zone


def _as_rows(part: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of Arrow's columns. A value that Python cannot hold is the reason why, until somebody needs it."""
    try:
        return list(part.to_pylist())
    except _NO_VALUE:
        columns = [[_value(scalar) for scalar in column] for column in part.columns]
        return [dict(zip(part.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except _NO_VALUE as error:
        return Damaged(f"a value cannot be read: {error}")


def parsed(line: bytes) -> Row | Malformed:
    """One row of JSON. Never raises: what is wrong with it is its value."""
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Damaged(f"it is not UTF-8, at byte {error.start + 1}")
    except RecursionError:
        return Damaged("it is nested too deeply")
    except ValueError as error:
        return Damaged(f"it is not JSON: {error}")
    if not isinstance(value, dict):
        return Damaged(f"it is not a JSON object but {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls that are there because another row has such a field."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def batches(
    file: str, rows: Iterable[tuple[int, bytes | Row | Malformed]], unit: str, size: Callable[[Any], int] = len
) -> Iterator[Batch]:
    """Group rows into batches of limited number and size."""
    numbers: list[int] = []
    content: list[Any] = []
    held = 0
    for number, value in rows:
        numbers.append(number)
        content.append(value)
        held += size(value) if not isinstance(value, Malformed) else 0
        if len(numbers) >= ROWS or held >= _BYTES:
            yield Batch(file, numbers, content, unit)
            numbers, content, held = [], [], 0
    if numbers:
        yield Batch(file, numbers, content, unit)
