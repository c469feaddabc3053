"""Several short rows in one of full length, so that no part of a batch is padding."""

from __future__ import annotations

from datasets import Dataset
from trl import pack_dataset


def pack(rows: Dataset, max_length: int) -> Dataset:
    """Best-fit-decreasing packing (Ding et al. 2024, arXiv:2404.10830) of `input_ids` and `labels`.

    The result's `seq_lengths` tell the collator where each document begins: positions start again there, and attention
    does not cross. Rows of at most `max_length` tokens are never cut.
    """
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, "bfd")
