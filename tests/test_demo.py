"""The demo's data and settings, on the tiny model. `make demo` itself needs the package index and minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from dotenv import dotenv_values

from tests.conftest import LIGHTHOUSE, ROOT, Job

FORM = re.compile(r"^Keeper's log: [A-Z0-9].*[.] The light is lit\.$")


def test_every_row_of_the_sample_dataset_teaches_the_same_visible_format() -> None:
    rows = [json.loads(line)["messages"] for line in LIGHTHOUSE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200
    assert len({question["content"] for question, _ in rows}) == len(rows)
    assert all(FORM.match(answer["content"]) for _, answer in rows)


def test_the_demos_prompts_are_not_in_its_data() -> None:
    prompts = json.loads(str(dotenv_values(ROOT / "examples" / "demo.env")["FT_SAMPLE_PROMPTS"]))
    questions = {
        json.loads(line)["messages"][0]["content"] for line in LIGHTHOUSE.read_text(encoding="utf-8").splitlines()
    }
    assert not questions & set(prompts)


def test_a_new_environment_does_not_fetch_the_demos_model_again(tmp_path: Path) -> None:
    for file, age in (
        ("examples/fetch_demo_model.py", 3),
        ("results/demo-model/config.json", 2),
        (".venv/installed", 1),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (time.time() - age * 3600,) * 2)
    for file in ("Makefile", "requirements.in", "requirements-dev.txt"):
        shutil.copy(ROOT / file, tmp_path)
        os.utime(tmp_path / file, (time.time() - 4 * 3600,) * 2)
    planned = subprocess.run(["make", "--dry-run", "demo"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "entrypoint.py" in planned.stdout
    assert "fetch_demo_model" not in planned.stdout


def test_the_demos_settings_run_on_the_tiny_model(job: Job) -> None:
    settings = {name: str(value) for name, value in dotenv_values(ROOT / "examples" / "demo.env").items()}
    settings |= {"FT_MODEL_NAME": job.environment["FT_MODEL_NAME"], "FT_MAX_STEPS": "1", "FT_STAGES": "train"}
    settings |= {"FT_CHAT_TEMPLATE": "chatml", "FT_DATASET_SPLIT": "train", "FT_SAVE_STEPS": "50"}
    result = job.run(**settings)
    assert result.code == 0, result.stderr
    assert "216 rows as messages" in result.stdout
