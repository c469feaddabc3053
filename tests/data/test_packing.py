"""Packed rows hold every token once, and no document attends to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset

from job.data.packing import pack
from tests.conftest import load_model

ROWS = [[1, 5, 6, 7, 2], [1, 8, 9, 2], [1, 10, 11, 12, 13, 14, 2], [1, 15, 2]]


def test_packing_keeps_every_row_whole_with_its_labels() -> None:
    packed = pack(Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}), 12)
    pieces = []
    for row in packed:
        assert len(row["input_ids"]) <= 12
        assert row["labels"] == row["input_ids"]
        start = 0
        for length in row["seq_lengths"]:
            pieces.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(pieces) == sorted(ROWS)


def test_no_token_attends_across_documents(make_run_with_model: Callable[..., Any]) -> None:
    """In a packed batch from trl's collator, each document has the outputs that it has alone."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = load_model(make_run_with_model(USE_4BIT="false"), quantized=False).eval()
    packed = pack(Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}), 12)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [packed[index] for index in range(len(packed))]
    )
    model.config.use_cache = False  # as in trl's trainer: with a cache, transformers ignores packing
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        start = 0
        for row in packed:
            for length in row["seq_lengths"]:
                alone = model(input_ids=batch["input_ids"][:, start : start + length]).logits[0]
                torch.testing.assert_close(together[start : start + length], alone, rtol=1e-4, atol=1e-4)
                start += length
        mixed = model(input_ids=batch["input_ids"], position_ids=torch.arange(start)[None]).logits[0]
    assert not torch.allclose(mixed, together, rtol=1e-2, atol=1e-2)  # the control: without positions, documents do mix
