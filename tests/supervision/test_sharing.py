"""Prepared rows are stored, and another machine takes them if they were made from the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import LIGHTHOUSE, Job


@pytest.fixture
def elsewhere(job: Job, tmp_path: Path) -> Job:
    """A run that was prepared on another machine, of which only the store is left."""
    file = tmp_path / "rows.jsonl"
    shutil.copy(LIGHTHOUSE, file)
    job.environment |= {"FT_STORE_URL": str(tmp_path / "store"), "FT_DATASET_NAME": str(file), "FT_STAGES": "prepare"}
    result = job.run()
    assert result.code == 0, result.stderr
    shutil.rmtree(job.environment["FT_OUTPUT_DIR"])
    return job


def rows_of(job: Job) -> bytes:
    folder = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "prepare" / "train"
    return next(folder.glob("*.arrow")).read_bytes()


def test_another_machine_takes_the_prepared_rows_from_the_store(elsewhere: Job, tmp_path: Path) -> None:
    result = elsewhere.run(FT_STAGES="train")
    assert result.code == 0, result.stderr
    assert "Stage prepare was finished by an earlier start, and its result is stored." in result.stdout
    assert "rows as messages" not in result.stdout  # nothing was prepared


@pytest.mark.parametrize("change", ["row", "damage", "tokenizer"])
def test_what_was_made_from_something_else_or_is_damaged_is_prepared_again(
    elsewhere: Job, tmp_path: Path, change: str
) -> None:
    stored = next((tmp_path / "store").rglob("*.arrow"))
    if change == "row":
        file = tmp_path / "rows.jsonl"
        file.write_bytes(file.read_bytes().replace(b"Paris", b"Parma"))
    elif change == "tokenizer":
        model = tmp_path / "model"
        shutil.copytree(elsewhere.environment["FT_MODEL_NAME"], model)
        config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 255}), encoding="utf-8")
        elsewhere.environment["FT_MODEL_NAME"] = str(model)
    else:
        stored.write_bytes(stored.read_bytes()[:-100])
    result = elsewhere.run()
    assert result.code == 0, result.stderr
    assert "rows as messages" in result.stdout
    if change == "row":
        assert b"Stage prepare was finished" not in result.stdout.encode()
    again = next((tmp_path / "store").rglob("*.arrow"))
    assert again.read_bytes() == rows_of(elsewhere)


def test_a_store_that_takes_no_prepared_rows_does_not_end_the_job(job: Job, tmp_path: Path) -> None:
    """It is a matter of time saved, not of work lost."""
    store = tmp_path / "store"
    (store / "test-run" / "stages").mkdir(parents=True)
    (store / "test-run" / "stages" / "prepare").write_text("in the way", encoding="utf-8")
    result = job.run(FT_STORE_URL=str(store), FT_STAGES="prepare")
    assert result.code == 0, result.stderr
    assert "The prepared data was not stored" in result.stdout
