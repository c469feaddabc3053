"""The evaluation loss is that of the tokens, whatever the batches and the processes are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from job.training.evaluation import IGNORED, TokenLoss
from tests.conftest import Job

DEVICE = torch.device("cpu")


@pytest.fixture
def uneven(job: Job, tmp_path: Path) -> Job:
    """Eleven rows to evaluate on, of which some are ten times as long as others."""
    words = "the lamp of the keeper is lit at night and "
    rows = [{"text": f"Row {number}: {words * (1 + 9 * (number % 3 == 0))}."} for number in range(11)]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    job.environment |= {
        "FT_EVAL_DATASET_NAME": str(tmp_path / "eval.jsonl"), "FT_EVAL_SPLIT": "train", "FT_MAX_STEPS": "1", "FT_STAGES": "train",
        "FT_LORA_DROPOUT": "0", "FT_USE_4BIT": "false",
    }  # fmt: skip
    return job


def loss_before_training(job: Job, **settings: str) -> float:
    result = job.run(**settings)
    assert result.code == 0, result.stderr
    run_id = settings["FT_RUN_ID"]
    metrics = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / run_id / "train" / "metrics.json"
    return float(json.loads(metrics.read_text(encoding="utf-8"))["eval_loss_first"])


def test_the_loss_is_the_same_in_batches_of_any_size_and_with_two_processes(uneven: Job) -> None:
    alone = loss_before_training(uneven, FT_RUN_ID="one", FT_PER_DEVICE_EVAL_BATCH_SIZE="1")
    for name, settings in (
        ("four", {"FT_PER_DEVICE_EVAL_BATCH_SIZE": "4"}),
        ("ranks", {"FT_PER_DEVICE_EVAL_BATCH_SIZE": "3", "FT_NPROC_PER_NODE": "2"}),
    ):
        assert loss_before_training(uneven, FT_RUN_ID=name, **settings) == pytest.approx(alone, rel=2e-6)


def test_tokens_of_short_batches_count_for_no_more_than_others() -> None:
    loss = TokenLoss(DEVICE, rows=2, batch_size=1, rank=0, processes=1)
    loss.add(torch.tensor(1.0), torch.tensor([[IGNORED, 5]]))
    loss.add(torch.tensor(2.0), torch.tensor([[IGNORED, 5, 5, 5]]))
    loss.add(torch.tensor(float("nan")), torch.tensor([[5, IGNORED]]))  # nothing to predict
    assert loss.mean(None) == pytest.approx(7 / 4)


@pytest.mark.parametrize("concatenated", [True, False])
def test_rows_that_only_fill_up_a_batch_are_not_counted_twice(concatenated: bool) -> None:
    """Five rows on two processes in batches of two: the second step has one real row, on the first process."""
    labels = torch.tensor([[IGNORED, 1, IGNORED, 2]]) if concatenated else torch.tensor([[IGNORED, 1], [IGNORED, 2]])
    inputs = {"labels": labels} | ({"position_ids": torch.tensor([[0, 1, 0, 1]])} if concatenated else {})
    learned = {}
    for rank in range(2):
        loss = TokenLoss(DEVICE, rows=5, batch_size=2, rank=rank, processes=2)
        learned[rank] = [
            [int(label) for label in loss.without_copies(inputs)["labels"].flatten() if label != IGNORED]
            for _ in range(2)
        ]
    assert learned == {0: [[1, 2], [1]], 1: [[1, 2], []]}
