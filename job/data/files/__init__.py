"""The data files that people have, each read as a stream of rows with their places: file and line, or file and row.

To add a kind of file, add its endings to `KINDS` and its reader to `_READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from job.data.files import arrow_files, csv_files, json_files, text_files
from job.data.files.batch import Batch, Damaged, FileOptions, LeftOut, Malformed, Row
from job.data.files.streams import PACKED

__all__ = ["Batch", "Damaged", "FileOptions", "LeftOut", "Malformed", "Row", "kind_of", "read_batches"]

KINDS = {
    "jsonl": "json", "ndjson": "json", "json": "json", "parquet": "parquet", "csv": "csv", "tsv": "csv",
    "arrow": "arrow", "feather": "arrow", "txt": "text",
}  # fmt: skip
_Reader = Callable[[Path, str, FileOptions], Iterator[Batch]]
_READERS: dict[str, _Reader] = {
    "json": json_files.read,
    "parquet": arrow_files.read_parquet,
    "csv": csv_files.read,
    "arrow": arrow_files.read_arrow,
    "text": text_files.read,
}


def kind_of(name: str) -> str | None:
    """The kind of data file that a name means, in any case and packed or not; None for any other file."""
    name = name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    stem, dot, ending = name.rpartition(".")
    return KINDS.get(ending) if dot and stem else None


def read_batches(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """The rows of one file, in order. `name` is what messages call it.

    The same file gives the same batches on every machine. Raises InputError if the file cannot be read at all.
    """
    return _READERS[kind_of(path.name) or "json"](path, name, options)
