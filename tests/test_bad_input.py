"""Every user mistake has its own exit code and a message that says how to fix it, and costs nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Job


def refused(job: Job, code: int, **settings: str) -> dict[str, Any]:
    result = job.run(FT_STAGES="preflight,download,prepare", **settings)
    assert result.code == code, result.stderr
    assert result.error["exit_code"] == code
    assert result.error["hint"]
    return result.error


def test_a_gpu_that_was_requested_but_is_missing(job: Job) -> None:
    error = refused(job, 69, FT_DEVICE="cuda")
    assert "torch sees no GPU" in error["message"]
    assert "FT_DEVICE=cpu" in error["hint"]


def test_a_dataset_without_the_column_is_refused_before_the_model_is_fetched(job: Job, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"ask": "a", "reply": "b"}\n' * 4, encoding="utf-8")
    error = refused(job, 65, FT_DATASET_NAME=str(tmp_path / "rows.jsonl"), FT_DATASET_SPLIT="train")
    assert "ask, reply" in error["message"]
    assert "FT_DATASET_COLUMNS" in error["hint"]
    assert not (Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "download" / "model").exists()


def test_an_empty_dataset(job: Job) -> None:
    assert "is empty" in refused(job, 65, FT_DATASET_SPLIT="train[:0]")["message"]


def test_a_model_folder_without_config_or_with_pickled_weights_only(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(job.environment["FT_MODEL_NAME"], folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(job, 65, FT_MODEL_NAME=str(folder))["message"]
    shutil.copy(Path(job.environment["FT_MODEL_NAME"]) / "config.json", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "Pickled weights" in refused(job, 65, FT_MODEL_NAME=str(folder))["hint"]


def test_a_path_that_does_not_exist(job: Job) -> None:
    assert "no such file" in refused(job, 78, FT_DATASET_NAME="./nowhere.jsonl")["message"]


def test_no_space_on_the_disk(job: Job, tmp_path: Path) -> None:
    """A model larger than any disk, by its listing: the file is sparse and takes no space."""
    folder = tmp_path / "model"
    shutil.copytree(job.environment["FT_MODEL_NAME"], folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**42)
    error = refused(job, 69, FT_MODEL_NAME=str(folder))
    assert " free, the run needs " in error["message"]
    assert "FT_OUTPUT_DIR" in error["hint"]


def test_rows_that_are_not_what_their_format_promises(job: Job, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "assistant", "content": "I begin."}]}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    error = refused(
        job,
        65,
        FT_DATASET_NAME=str(tmp_path / "rows.jsonl"),
        FT_DATASET_SPLIT="train",
        FT_EVAL_SPLIT="",
        FT_CHAT_TEMPLATE="llama-2",
    )
    assert "8 of 8 train rows cannot be used as messages" in error["message"]


def test_a_row_longer_than_the_models_context(job: Job) -> None:
    assert "256 positions" in refused(job, 65, FT_MAX_SEQ_LENGTH="4096")["message"]


@pytest.mark.parametrize("kind", ["foreign folder", "file"])
def test_a_destination_that_would_be_overwritten_is_refused_at_the_start(job: Job, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine", encoding="utf-8")
    else:
        target.mkdir()
        (target / "precious.txt").write_text("mine", encoding="utf-8")
    result = job.run(FT_PUBLISH_TO=str(target))
    assert result.code == 78
    assert "FT_PUBLISH_TO" in result.error["message"]


def test_a_target_module_that_the_model_does_not_have(job: Job) -> None:
    result = job.run(FT_STAGES="train", FT_LORA_TARGET_MODULES="q_prj")
    assert result.code == 65, result.stderr
    assert "FT_LORA_TARGET_MODULES" in result.error["message"]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_a_base_in_a_quantization_that_cannot_be_trained_is_refused_before_it_is_fetched(
    job: Job, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(job.environment["FT_MODEL_NAME"], folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error = refused(job, 65, FT_MODEL_NAME=str(folder))
    assert f"stored quantized with {method}" in error["message"]
    assert not Path(job.environment["FT_OUTPUT_DIR"]).exists()


def test_a_target_that_is_no_inner_layer_is_refused_by_the_settings(job: Job) -> None:
    assert "lm_head" in refused(job, 78, FT_LORA_TARGET_MODULES="q_proj,lm_head")["message"]
