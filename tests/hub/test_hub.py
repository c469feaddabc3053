"""Download from and publish to a Hub that speaks the real protocol over a socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIGHTHOUSE, Job
from tests.fake_hub import FakeHub


@pytest.fixture
def hub_job(job: Job, hub: FakeHub, tiny_model: Path) -> Job:
    """The job with its model and dataset on the Hub, and a token."""
    hub.add("models/base/tiny", tiny_model)
    hub.add(
        "datasets/data/lighthouse",
        {"train.jsonl": LIGHTHOUSE.read_bytes(), "evil.py": b"raise SystemExit", "README.md": b"# Data"},
    )
    job.environment |= {
        "FT_MODEL_NAME": "base/tiny", "FT_DATASET_NAME": "data/lighthouse", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test_token",
    }  # fmt: skip
    return job


def folder_of(job: Job) -> Path:
    return Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"


def test_the_whole_job_from_the_hub_to_the_hub(hub_job: Job, hub: FakeHub) -> None:
    result = hub_job.run(FT_PUBLISH_TO="hf://me/tuned", FT_MAX_STEPS="2")
    assert result.code == 0, result.stderr
    files = hub.files("models/me/tuned")
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "adapter/adapter_model.safetensors",
        "loss_curve.png",
    } <= set(files)
    card = files["README.md"].decode()
    assert "base_model: base/tiny" in card
    assert "- data/lighthouse" in card
    assert 'pipeline("text-generation", "me/tuned"' in card
    assert "--lora-modules tuned=./adapter   # in a copy of this repository\n" in card
    branch = hub.files("models/me/tuned", "adapter")["README.md"].decode()
    assert "--lora-modules tuned=.   # in a copy of this repository's branch adapter\n" in branch
    commits = [path for method, path, _ in hub.requests if method == "POST" and "/commit/" in path]
    assert [path.rpartition("/")[2] for path in commits] == [
        "adapter",
        "main",
    ]  # no half-finished model is ever visible
    assert hub.tags["models/me/tuned", "test-run"] == hub.repositories["models/me/tuned"][-1][0]
    assert not any("evil.py" in path for _, path, _ in hub.requests)
    assert b"hf_test_token" not in b"".join(files.values())


def test_a_cluster_whose_nodes_have_no_internet_trains_what_its_login_node_fetched_and_publishes(
    hub_job: Job, hub: FakeHub
) -> None:
    """As docs/operations.md tells it."""
    shared = {"FT_PUBLISH_TO": "hf://me/tuned", "FT_MAX_STEPS": "2"}
    fetched = hub_job.run(FT_STAGES="download,prepare", FT_DEVICE="cuda", **shared)  # a login node has no GPU
    assert fetched.code == 0, fetched.stderr
    asked = len(hub.requests)
    trained = hub_job.run(
        FT_STAGES="train,sample,merge", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="", **shared
    )
    assert trained.code == 0, trained.stderr
    assert len(hub.requests) == asked
    published = hub_job.run(FT_STAGES="publish", **shared)
    assert published.code == 0, published.stderr
    assert "model.safetensors" in hub.files("models/me/tuned")


_AS_A_READER = """
    import json
    from pathlib import Path
    from huggingface_hub import snapshot_download
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = Path(snapshot_download("me/tuned"))
    tokenizer = AutoTokenizer.from_pretrained("me/tuned")
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    of_the_branch = AutoPeftModelForCausalLM.from_pretrained("me/tuned", revision="adapter")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for sample in json.loads((folder / "samples.json").read_text()):
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": sample["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == sample["tuned"]
    print(adapted.peft_config["default"].revision, of_the_branch.peft_config["default"].revision)
"""


def test_readers_load_model_and_adapter_from_the_hub_at_the_bases_commit(
    hub_job: Job, hub: FakeHub, tmp_path: Path
) -> None:
    result = hub_job.run(FT_PUBLISH_TO="hf://me/tuned", FT_MAX_STEPS="2", FT_MERGE_DTYPE="float32")
    assert result.code == 0, result.stderr
    commit = hub.repositories["models/base/tiny"][-1][0]
    hub.commit("models/base/tiny", {"config.json": b"{}"})  # the base has moved on
    environment = {**os.environ, **hub_job.environment, "HF_HOME": str(tmp_path / "a reader's")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_AS_A_READER)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (
        'AutoPeftModelForCausalLM.from_pretrained("me/tuned", revision="adapter")'
        in hub.files("models/me/tuned")["README.md"].decode()
    )
    assert done.stdout.split() == [commit, commit]


def test_a_restart_uses_the_commit_that_the_first_start_resolved(hub_job: Job, hub: FakeHub) -> None:
    first = hub.repositories["models/base/tiny"][0][0]
    assert hub_job.run(FT_STAGES="download").code == 0
    hub.commit("models/base/tiny", {"config.json": b"{}", "model.safetensors": b"moved", "tokenizer.json": b"{}"})
    marker = folder_of(hub_job) / "download" / "MANIFEST.json"
    marker.unlink()
    assert hub_job.run(FT_STAGES="download").code == 0
    sources = json.loads((folder_of(hub_job) / "download" / "sources.json").read_text(encoding="utf-8"))
    assert sources["FT_MODEL_NAME"]["commit"] == first
    assert (folder_of(hub_job) / "download" / "model" / "config.json").read_bytes() != b"{}"


def test_a_revision_is_used_and_an_unknown_one_is_refused(hub_job: Job, hub: FakeHub) -> None:
    first = hub.repositories["models/base/tiny"][0][0]
    hub.commit("models/base/tiny", {"config.json": b"{}"})
    assert hub_job.run(FT_STAGES="download", FT_MODEL_NAME=f"base/tiny@{first}").code == 0
    result = hub_job.run(FT_STAGES="download", FT_MODEL_NAME="base/tiny@nothing", FT_RUN_ID="other")
    assert result.code == 78
    assert "no such revision" in result.error["message"]


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        ("absent", 78, "does not exist on the Hub, or is private"),
        ("gated", 77, "is gated"),
        ("forbidden", 77, "The Hub refused"),
        ("unauthorized", 77, "The Hub refused"),
        ("failing", 75, "answered 500"),
        ("unreachable", 75, "cannot be reached"),
        ("offline", 78, "HF_HUB_OFFLINE"),
    ],
)
def test_a_refusal_by_the_hub_is_reported_at_the_start_with_its_exit_code(
    hub_job: Job, hub: FakeHub, what: str, code: int, told: str
) -> None:
    settings: dict[str, str] = {"FT_STAGES": "preflight,download"}
    if what == "absent":
        settings["FT_DATASET_NAME"] = "data/lighthous"
    elif what == "gated":
        hub.gated.add("models/base/tiny")
    elif what == "unreachable":
        settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
    elif what == "offline":
        settings["HF_HUB_OFFLINE"] = "1"
    else:
        hub.refuse = {"forbidden": 403, "unauthorized": 401, "failing": 500}[what]
    result = hub_job.run(**settings)
    assert result.code == code, result.stderr
    assert told in result.error["message"] + result.error["hint"]
    assert "hf_test_token" not in result.stdout + result.stderr


def test_a_hub_that_will_not_accept_the_model_is_detected_before_anything_is_downloaded(
    hub_job: Job, hub: FakeHub
) -> None:
    hub.writable = False
    result = hub_job.run(FT_PUBLISH_TO="hf://someone-else/tuned")
    assert result.code == 77, result.stderr
    assert "FT_PUBLISH_TO=hf://someone-else/tuned" in result.error["message"]
    assert not (folder_of(hub_job) / "download").exists()


def test_an_upload_that_arrives_damaged_is_noticed(
    hub: FakeHub, make_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import HfApi

    from job.errors import TransientError
    from job.hub import to_hub

    monkeypatch.setenv("HF_TOKEN", "hf_test_token")
    monkeypatch.setattr(to_hub, "HfApi", lambda: HfApi(endpoint=hub.url, token="hf_test_token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_bytes(b"# Card")
    run = make_run(PUBLISH_TO="hf://me/tuned")
    (folder / "finetune_run.json").write_text(json.dumps({"run_id": run.id}), encoding="utf-8")
    destination = to_hub.HubRepository(run, "me/tuned")
    record = destination.publish(folder)
    assert (record["repository"], record["commit"]) == ("me/tuned", hub.repositories["models/me/tuned"][-1][0])
    hub.corrupt_uploads = True
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(TransientError, match=r"differ from those sent for model\.safetensors"):
        destination.publish(folder)
