"""Packed rows hold every token once, and no document attends to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data.packing import bins
from job.data.prepared import writing
from tests.conftest import load_model

ROWS = [[1, 5, 6, 7, 2], [1, 8, 9, 2], [1, 10, 11, 12, 13, 14, 2], [1, 15, 2]]


def packed(folder: Path, rows: list[list[int]] = ROWS, max_length: int = 12) -> Any:
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    starts = np.cumsum([0, *map(len, rows)])
    with writing(folder, packed=True, max_length=max_length) as writer:
        writer.add(ids, ids % 2 == 0, starts)
    return load_from_disk(str(folder))


def test_packing_keeps_every_row_whole_with_its_labels(tmp_path: Path) -> None:
    pieces = []
    for row in packed(tmp_path):
        assert len(row["input_ids"]) <= 12
        assert row["labels"] == [token if token % 2 == 0 else -100 for token in row["input_ids"]]
        start = 0
        for length in row["seq_lengths"]:
            pieces.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(pieces) == sorted(ROWS)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300))
def test_bins_are_those_of_trl(lengths: list[int]) -> None:
    from trl.data_utils import _pack_bfd

    rows = Dataset.from_dict({"input_ids": [[index] * length for index, length in enumerate(lengths)]})
    theirs = _pack_bfd(rows.with_format("arrow")[:], 64)
    mine = [[index for index in group for _ in range(lengths[index])] for group in bins(np.array(lengths), 64)]
    assert mine == theirs["input_ids"].to_pylist()


def test_no_token_attends_across_documents(make_run_with_model: Callable[..., Any], tmp_path: Path) -> None:
    """In a packed batch from trl's collator, each document has the outputs that it has alone."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_model(make_run_with_model(USE_4BIT="false"), quantized=False).eval()
    rows = packed(tmp_path)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [rows[index] for index in range(len(rows))]
    )
    model.config.use_cache = False  # as in trl's trainer: with a cache, transformers ignores packing
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        start = 0
        for row in rows:
            for length in row["seq_lengths"]:
                alone = model(input_ids=batch["input_ids"][:, start : start + length]).logits[0]
                torch.testing.assert_close(together[start : start + length], alone, rtol=1e-4, atol=1e-4)
                start += length
        mixed = model(input_ids=batch["input_ids"], position_ids=torch.arange(start)[None]).logits[0]
    assert not torch.allclose(mixed, together, rtol=1e-2, atol=1e-2)  # the control: without positions, documents do mix
