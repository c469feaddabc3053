"""A limit on what a dataset's files may unpack to: more than the disk holds is no dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

from job.errors import InputError


def refuse_bombs(files: Iterable[Path], room_bytes: int) -> None:
    """Raise InputError for Parquet files that unpack to more than there is room for, by their own footers."""
    total = 0
    for file in files:
        if not file.name.lower().endswith(".parquet"):
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
