"""Parquet and Arrow files, of which only the columns that are needed are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from job.data.files.batch import ROWS, Batch, FileOptions
from job.errors import InputError


def read_parquet(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """The rows of a Parquet file."""
    try:
        with pq.ParquetFile(path) as file:
            columns = _needed(name, file.schema_arrow.names, options)
            yield from _batches(name, file.iter_batches(ROWS, columns=columns))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, "Parquet", error) from error


def read_arrow(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """The rows of an Arrow file, in the format for streams, which the datasets library writes, or the one for files."""
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                source.seek(0)
                file = pa.ipc.open_file(source)
                parts: Iterable[pa.RecordBatch] = (file.get_batch(index) for index in range(file.num_record_batches))
                yield from _batches(name, _selected(parts, _needed(name, file.schema.names, options)))
                return
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            yield from _batches(name, _selected(stream, _needed(name, stream.schema.names, options)))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(name, "Arrow", error) from error


def _needed(file: str, names: list[str], options: FileOptions) -> list[str]:
    if doubled := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{file}: the column {min(doubled)!r} is there twice.", "Rename one of them.")
    return [name for name in names if options.columns is None or name.strip().lower() in options.columns]


def _selected(parts: Iterable[pa.RecordBatch], columns: list[str]) -> Iterator[pa.RecordBatch]:
    return (part.select(columns) for part in parts)


def _batches(name: str, parts: Iterable[pa.RecordBatch]) -> Iterator[Batch]:
    first = 1
    for whole in parts:
        for start in range(0, whole.num_rows, ROWS):
            part = whole.slice(start, ROWS)
            yield Batch(name, range(first, first + part.num_rows), part, "row")
            first += part.num_rows


def _unreadable(name: str, kind: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno is not None:  # a fault of the disk. Without one it is of the content
        return error
    return InputError(f"{name} cannot be read as {kind}: {error}", "Repair the file, or download it again.")
