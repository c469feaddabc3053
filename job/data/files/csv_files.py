"""CSV and TSV: every value is text, and the separator and the encoding are recognised."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.data.files.batch import Batch, Damaged, FileOptions, Malformed, Row, batches
from job.data.files.streams import as_text, encoding_of, opened
from job.errors import InputError

_SEPARATORS = ",;\t|"
_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_LONGEST_FIELD = 64 << 20


def read(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """The rows of a CSV file, as mappings from the names in its first line."""
    with opened(path, name) as stream:
        encoding = encoding_of(stream, name, options)
        head = stream.peek(1 << 16).decode(encoding, errors="ignore").lstrip("\ufeff")
        separator = options.separator or _separator(head)
        if separator != "," and options.separator is None:
            options.tell(f"{name}: the columns are separated by {_NAMES[separator]}s.")
        with as_text(stream, name, encoding) as text:
            csv.field_size_limit(_LONGEST_FIELD)
            reader = csv.reader(text, delimiter=separator, strict=True)
            yield from batches(name, _rows(reader, name), "line", size=_size)


def _rows(reader: Any, name: str) -> Iterator[tuple[int, Row | Malformed]]:
    try:
        columns = [column.lstrip("\ufeff").strip() for column in next(reader, [])]
    except csv.Error as error:
        raise InputError(f"{name}, line 1: not CSV: {error}.", "Repair the file.") from error
    if doubled := {column for column in columns if columns.count(column) > 1}:
        raise InputError(f"{name}, line 1: the column {min(doubled)!r} is there twice.", "Rename one of them.")
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield line, Damaged(f"it is not CSV: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        if len(fields) != len(columns):
            yield line, Damaged(f"it has {len(fields)} fields, and the first line names {len(columns)}")
            continue
        yield line, dict(zip(columns, fields, strict=True))


def _separator(head: str) -> str:
    """The character that makes the most columns of the first line, outside quotes."""
    line, quoted = [], False
    for character in head:
        if character == '"':
            quoted = not quoted
        elif character in "\r\n" and not quoted:
            break
        if not quoted:
            line.append(character)
    counts = {separator: line.count(separator) for separator in _SEPARATORS}
    return max(counts, key=lambda separator: counts[separator])


def _size(row: Row) -> int:
    return sum(map(len, row.values()))
