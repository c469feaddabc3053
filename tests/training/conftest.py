"""A run with prepared data, ready to train in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from job.run import Run
from tests.conftest import LIGHTHOUSE

STEPS = 10


@pytest.fixture
def prepared(
    make_run_with_model: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    from job.stages.prepare import prepare

    monkeypatch.setattr("job.stages.prepare.limit_files", lambda largest: None)  # for all tests of this process

    def make(folder: str, **settings: str) -> Run:
        defaults = {
            "OUTPUT_DIR": str(tmp_path / folder), "MAX_STEPS": str(STEPS), "LOGGING_STEPS": "1", "LEARNING_RATE": "1e-2", "LORA_R": "4",
            "SAVE_STEPS": "1000",
        }  # fmt: skip
        run = make_run_with_model(**{**defaults, **settings})
        run.paths.dataset_dir.mkdir()
        (run.paths.dataset_dir / "rows.jsonl").symlink_to(LIGHTHOUSE)
        prepare(run)
        return run

    return make
