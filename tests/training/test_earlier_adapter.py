"""Training goes on from an earlier adapter, or only merges and publishes it, wherever it lies."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Job, published, read_until
from tests.fake_hub import FakeHub


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, uninterrupted: Job) -> Path:
    """What the uninterrupted run published: a merged model with its adapter in a folder."""
    folder = tmp_path_factory.mktemp("earlier") / "tiny-lighthouse"
    shutil.copytree(published(uninterrupted), folder)
    return folder


pytestmark = pytest.mark.xdist_group("uninterrupted")


def metrics(job: Job) -> dict[str, Any]:
    file = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "train" / "metrics.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_the_first_loss_is_the_earlier_runs_last_and_training_goes_on(job: Job, earlier: Path) -> None:
    result = job.run(FT_ADAPTER_NAME=str(earlier), FT_MAX_STEPS="3", FT_LORA_R="4")
    assert result.code == 0, result.stderr
    before = json.loads((earlier / "finetune_run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics(job)["eval_loss_first"] == pytest.approx(before["eval_loss_last"], rel=1e-6)
    assert metrics(job)["eval_loss_last"] < before["eval_loss_last"]
    record = (published(job) / "finetune_run.json").read_text(encoding="utf-8")
    card = (published(job) / "README.md").read_text(encoding="utf-8")
    assert str(earlier.parent) not in record + card
    assert f"going on from the adapter `{earlier.name}`" in card


def test_without_training_it_is_merged_into_the_same_model(job: Job, earlier: Path) -> None:
    result = job.run(FT_ADAPTER_NAME=str(earlier / "adapter"), FT_STAGES="merge,publish")
    assert result.code == 0, result.stderr
    assert (published(job) / "model.safetensors").read_bytes() == (earlier / "model.safetensors").read_bytes()
    card = (published(job) / "README.md").read_text(encoding="utf-8")
    assert "with an adapter that was trained elsewhere, `adapter`" in card
    assert "-e FT_STAGES=merge,publish" in card
    for untrue in ("fine-tuned on", "## Data", "datasets:"):
        assert untrue not in card
    assert job.run(FT_ADAPTER_NAME=str(earlier / "adapter"), FT_STAGES="merge,publish").code == 0
    trained = job.run(FT_ADAPTER_NAME=str(earlier / "adapter"))
    assert trained.ended["train"] == "done"  # what was only merged does not pass for trained


def test_from_the_hub_it_is_taken_at_its_commit(job: Job, earlier: Path, hub: FakeHub) -> None:
    commit = hub.add("models/me/earlier", earlier)
    job.environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    result = job.run(FT_ADAPTER_NAME="me/earlier", FT_STAGES="merge")
    assert result.code == 0, result.stderr
    sources = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "download" / "sources.json"
    assert json.loads(sources.read_text(encoding="utf-8"))["FT_ADAPTER_NAME"]["commit"] == commit
    assert not any("model.safetensors" in path and "adapter" not in path for _, path, _ in hub.requests)


def test_a_killed_training_that_went_on_from_it_ends_at_the_same_adapter(job: Job, earlier: Path) -> None:
    options = {"FT_ADAPTER_NAME": str(earlier), "FT_STAGES": "train", "FT_SAVE_STEPS": "1"}
    assert job.run(**options).code == 0
    output = Path(job.environment["FT_OUTPUT_DIR"])
    adapter = output / "runs" / "test-run" / "train" / "adapter" / "adapter_model.safetensors"
    straight = adapter.read_bytes()
    shutil.rmtree(output)
    process = job.start(**options)
    read_until(process, event="progress", stage="train", done=2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert job.run(**options).code == 0
    assert adapter.read_bytes() == straight


@pytest.mark.parametrize(
    ("change", "settings", "code", "wanted"),
    [
        ({}, {"FT_LORA_R": "8"}, 78, "FT_LORA_R is set to 8"),
        ({"bias": "all"}, {}, 65, "its bias is 'all'"),
        ({"peft_type": "IA3"}, {}, 65, "its peft_type is 'IA3'"),
        ({"target_modules": ".*proj"}, {}, 65, "not a list of names"),
        ({"r": 10**9}, {}, 65, "adapter_config.json"),
        (None, {}, 65, "no adapter_config.json"),
    ],
    ids=["another rank", "biases", "another kind", "a pattern", "an absurd rank", "no adapter"],
)
def test_an_adapter_that_cannot_be_used_is_refused_before_anything_is_trained(
    job: Job,
    earlier: Path,
    tmp_path: Path,
    change: dict[str, Any] | None,
    settings: dict[str, str],
    code: int,
    wanted: str,
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(earlier / "adapter", folder)
    file = folder / "adapter_config.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    result = job.run(FT_ADAPTER_NAME=str(folder), **settings)
    assert result.code == code, result.stderr
    assert wanted in result.error["message"]
    assert "train" not in {event.get("stage") for event in result.events if event.get("event") == "stage_started"}
