"""The job trains exactly like a plain TRL script: with the same settings and seed, every step has the same loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Job

STEPS = 8


@pytest.fixture
def inst_rows(tmp_path: Path, tiny_model: Path) -> Path:
    """The sample dataset as plain text in the notebook's format."""
    from tests.conftest import LIGHTHOUSE

    file = tmp_path / "inst.jsonl"
    rows = [json.loads(line)["messages"] for line in LIGHTHOUSE.read_text(encoding="utf-8").splitlines()[:64]]
    texts = [f"<s>[INST] {question['content']} [/INST] {answer['content']} </s>" for question, answer in rows]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return file


@pytest.mark.parametrize("layers", ["seed", "all-linear"])
def test_the_loss_is_that_of_a_plain_trl_script_at_every_step(
    job: Job, inst_rows: Path, tmp_path: Path, layers: str
) -> None:
    variant = (
        {"FT_LORA_TARGET_MODULES": "all-linear", "FT_LORA_ALPHA": "64", "FT_LEARNING_RATE": "1e-3"}
        if layers == "all-linear"
        else {"FT_LEARNING_RATE": "2e-4"}
    )
    result = job.run(
        FT_STAGES="train", FT_DATASET_NAME=str(inst_rows), FT_DATASET_SPLIT="train", FT_EVAL_SPLIT="", FT_LORA_R="64", FT_MAX_STEPS=str(STEPS),
        FT_MAX_SEQ_LENGTH="48", FT_TOO_LONG="cut", FT_SAVE_STEPS="100", **variant,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    state = json.loads(
        (Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "train" / "trainer_state.json").read_text(
            encoding="utf-8"
        )
    )
    ours = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    script = [
        sys.executable,
        str(ROOT / "benchmarks" / "plain_trl.py"),
        job.environment["FT_MODEL_NAME"],
        str(inst_rows),
        "-",
        str(tmp_path / "plain.json"),
    ]
    options = [
        "--device",
        "cpu",
        "--steps",
        str(STEPS),
        "--length",
        "48",
        *(["--all-linear"] if layers == "all-linear" else []),
    ]
    subprocess.run([*script, *options], check=True, capture_output=True)
    plain = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8"))["losses"]
    assert len(plain) == len(ours) == STEPS
    assert ours == pytest.approx(plain, rel=1e-5)
    assert len(set(plain)) == STEPS
