"""Limits on what a dataset's files may ask of the reader: nesting that crashes it, and more data than the disk holds."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from job.errors import InputError

_DEEPEST = 100  # levels of a JSON row: pyarrow's reader recurses, and a deep one ends the process
_PART = 16 << 20
_LARGEST_ROW = 256 << 20  # bytes between two line breaks


def refuse_deep_json(file: Path) -> None:
    """Raise InputError, with the line, for a JSON file that the reader could not survive.

    Brackets inside texts are counted too, which is fast, and lines that look deep by that are read properly.
    """
    depth = 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    with file.open("rb") as stream:
        while part := stream.read(_PART):
            try:
                decoder.decode(part)
            except UnicodeDecodeError:
                _refuse_other_encoding(file)
            values = np.frombuffer(part, dtype=np.uint8)
            steps = ((values == 123) | (values == 91)).astype(np.int32) - ((values == 125) | (values == 93))
            levels = depth + np.cumsum(steps)
            if len(levels) and int(levels.max()) > _DEEPEST:
                _read_properly(file)
                return
            depth = int(levels[-1])


def _read_properly(file: Path) -> None:
    for number, line in _lines(file):
        deepest = _depth(line)
        if deepest > _DEEPEST:
            raise InputError(
                f"{file.name}, line {number}: nested {deepest:,} levels deep, and {_DEEPEST} are the most.",
                "Remove the row.",
            )


def _refuse_other_encoding(file: Path) -> None:
    for number, line in _lines(file):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file.name}, line {number}: not UTF-8, at byte {error.start + 1} of the line.",
                "Save the file as UTF-8.",
            ) from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(_LARGEST_ROW):
            number += 1
            yield number, line


def _depth(line: bytes) -> int:
    """Levels of brackets outside of texts."""
    depth = deepest = 0
    in_text = escaped = False
    for byte in line:
        if in_text:
            if escaped:
                escaped = False
            elif byte == 92:
                escaped = True
            elif byte == 34:
                in_text = False
        elif byte == 34:
            in_text = True
        elif byte in (123, 91):
            depth += 1
            deepest = max(deepest, depth)
            if deepest > 100 * _DEEPEST:
                return deepest
        elif byte in (125, 93):
            depth -= 1
    return deepest


def refuse_bombs(files: list[Path], room_bytes: int) -> None:
    """Raise InputError for Parquet files that unpack to more than there is room for, by their own footers."""
    total = 0
    for file in files:
        if not file.name.endswith(".parquet"):
            continue
        try:
            footer = pq.ParquetFile(file).metadata
        except Exception as error:  # pyarrow raises many kinds for files that are not what they are called
            raise InputError(f"{file.name} is not a Parquet file: {error}", "Repair or remove it.") from error
        total += sum(footer.row_group(index).total_byte_size for index in range(footer.num_row_groups))
        if total > room_bytes:
            raise InputError(
                f"{file.name} unpacks to {total:,} bytes with those before it, and there is room for {room_bytes:,}.",
                "Set FT_OUTPUT_DIR to a larger volume if the dataset is really that large.",
            )
