"""Plain text: each paragraph is a row, or each line of a file without blank lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from job.data.files.batch import Batch, FileOptions, Malformed, Row, batches
from job.data.files.streams import as_text, encoding_of, opened

TEXT = "text"


def read(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """Rows with the one column `text`."""
    paragraphs = _has_paragraphs(path, name, options)
    options.tell(f"{name}: each {'paragraph' if paragraphs else 'line'} is a row.")
    with opened(path, name) as stream:
        encoding = encoding_of(stream, name, options)
        with as_text(stream, name, encoding) as text:
            yield from batches(name, _rows(text, paragraphs), "line", size=lambda row: len(row[TEXT]))


def _rows(lines: Iterator[str], paragraphs: bool) -> Iterator[tuple[int, Row | Malformed]]:
    held: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        plain = line.lstrip("\ufeff") if number == 1 else line
        if not plain.strip():
            if held:
                yield first, {TEXT: "".join(held).strip("\r\n")}
            held = []
            continue
        if not paragraphs:
            yield number, {TEXT: plain.strip("\r\n")}
            continue
        first = first if held else number
        held.append(plain)
    if held:
        yield first, {TEXT: "".join(held).strip("\r\n")}


def _has_paragraphs(path: Path, name: str, options: FileOptions) -> bool:
    """Whether a blank line stands between two that are not."""
    quiet = FileOptions(options.encoding)
    with opened(path, name) as stream, as_text(stream, name, encoding_of(stream, name, quiet)) as text:
        seen = blank = False
        for line in text:
            if not line.strip():
                blank = seen
            elif blank:
                return True
            else:
                seen = True
    return False
