"""The row order when several processes each draw it for themselves."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.multiprocessing
from datasets import Dataset

from job.training.data_order import DataOrder, row_lengths


def _draw(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # as dropout leaves the generators of two processes after an epoch
    DataOrder().epoch_began()
    torch.save(torch.randperm(100), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_processes_whose_generators_differ_draw_the_same_order() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_draw, (folder,), nprocs=2)
        first, second = (torch.load(Path(folder) / str(rank)) for rank in range(2))
    assert torch.equal(first, second)


def test_row_lengths_follow_the_selected_rows_and_their_order() -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (3, 1, 4, 1, 5, 9)]})
    assert row_lengths(rows.with_format("numpy")) == [3, 1, 4, 1, 5, 9]
    assert row_lengths(rows.select([5, 0, 2])) == [9, 3, 4]
