"""docs/layout.md says how to add a stage, a store and a format: done as it says, in a copy, each works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Job, finished


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copytree(ROOT / "job", folder / "job", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "entrypoint.py", folder)
    return folder


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old} in {file.name}"
    file.write_text(text.replace(old, new), encoding="utf-8")


def start(copy: Path, job: Job, **settings: str) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, str(copy / "entrypoint.py")], env={**os.environ, **job.environment, **settings}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    result = finished(process, *process.communicate(timeout=120))
    return result.code, result.stdout, result.stderr


def test_a_stage_is_one_file_one_line_and_two_names(copy: Path, job: Job) -> None:
    (copy / "job/stages/greet.py").write_text(
        "from job.report.events import message\nfrom job.run import Run, write_json\n\n\n"
        "def greet(run: Run) -> None:\n    message('Good morning.')\n    write_json(run.paths.greeting_file, 'Good morning.')\n",
        encoding="utf-8",
    )
    change(
        copy / "job/stages/__init__.py",
        "    # Trains with QLoRA",
        '    Stage(name="greet", needs=("prepare",)),\n    # Trains with QLoRA',
    )
    settings = copy / "job/settings.py"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('"prepare", "train"', '"prepare", "greet", "train"'), encoding="utf-8")
    change(
        copy / "job/paths.py", "    # train\n",
        "    @property\n    def greeting_file(self) -> Path:\n        return self.stage_dir('greet') / 'greeting.json'\n\n    # train\n",
    )  # fmt: skip
    code, out, errors = start(copy, job, FT_STAGES="greet")
    assert code == 0, errors
    assert "Good morning." in out
    assert (
        json.loads((Path(job.environment["FT_OUTPUT_DIR"]) / "runs/test-run/greet/greeting.json").read_text())
        == "Good morning."
    )


def test_a_store_is_one_file_and_one_line(copy: Path, job: Job, tmp_path: Path) -> None:
    (copy / "job/storage/vault.py").write_text(
        "from pathlib import Path\nfrom job.storage.local import LocalStore\n\n\nclass VaultStore(LocalStore):\n"
        "    def __init__(self, url: str) -> None:\n        super().__init__(Path(url.removeprefix('vault:/')))\n",
        encoding="utf-8",
    )
    change(
        copy / "job/storage/__init__.py", "SCHEMES: dict",
        "def _vault(url: str) -> Store:\n    from job.storage.vault import VaultStore\n\n    return VaultStore(url)\n\n\nSCHEMES: dict",
    )  # fmt: skip
    change(copy / "job/storage/__init__.py", '"s3": _s3}', '"s3": _s3, "vault": _vault}')
    code, _, errors = start(copy, job, FT_STAGES="download", FT_STORE_URL=f"vault:/{tmp_path / 'safe'}")
    assert code == 0, errors
    assert (tmp_path / "safe/test-run/run.json").is_file()


def test_a_format_is_one_entry_and_its_name(copy: Path, job: Job, tmp_path: Path) -> None:
    change(
        copy / "job/data/formats.py", "FORMATS = (\n",
        "def _read_haiku(row: Row, _: Reading) -> Example:\n    return Example(text=' / '.join(row['lines']))\n\n\nFORMATS = (\n"
        '    Format("haiku", _read_haiku, ("lines",), chat=False),\n',
    )  # fmt: skip
    change(copy / "job/settings.py", '"auto", "text", "messages",', '"auto", "haiku", "text", "messages",')
    rows = [{"lines": [f"The lamp turns {count}", "and the sea", "listens"]} for count in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    named = {"FT_DATASET_NAME": str(tmp_path / "rows.jsonl"), "FT_DATASET_SPLIT": "train", "FT_EVAL_SPLIT": ""}
    code, out, errors = start(copy, job, FT_STAGES="prepare", **named)
    assert code == 0, errors
    assert "8 rows as haiku" in out
