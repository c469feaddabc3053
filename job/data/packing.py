"""Packs several short rows into one full-length row, so that batches need no padding."""

from __future__ import annotations

from datasets import Dataset
from trl import pack_dataset


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Best-fit-decreasing packing (Ding et al. 2024, arXiv:2404.10830) of `input_ids` and `labels`.

    The result's `seq_lengths` tell the collator where each document starts. Positions restart there, and attention does
    not cross. Rows of at most `max_length` tokens are never cut.
    """
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, "bfd")
