"""Every kind of adapter is trained, resumed, merged and proved by the whole job, and what does not go together is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.environment import load_settings
from job.errors import SettingsError
from tests.conftest import LIGHTHOUSE, Job, published, read_until

KINDS = {
    "scaled by the root of the rank": {"FT_USE_RSLORA": "true"},
    "with other ranks and alphas": {
        "FT_LORA_TARGET_MODULES": "all-linear", "FT_LORA_RANK_PATTERN": '{"down_proj": 8}', "FT_LORA_ALPHA_PATTERN": '{"q_proj": 3}',
    },
    "with directions and lengths": {"FT_USE_DORA": "true"},
    "with embedding and head in full": {"FT_MODULES_TO_SAVE": "lm_head,embed_tokens"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_merged_and_proved(job: Job, kind: str) -> None:
    result = job.run(**KINDS[kind], FT_MAX_STEPS="4", FT_EVAL_SPLIT="0.2")
    assert result.code == 0, result.stderr
    config = json.loads((published(job) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    asked = {name.removeprefix("FT_").lower().removeprefix("lora_"): value for name, value in KINDS[kind].items()}
    for name, value in asked.items():
        if name in config and name != "target_modules":
            assert config[name] == (json.loads(value) if value[0] in "{t" else value.split(",")), name
    proof = json.loads((published(job) / "merge_proof.json").read_text(encoding="utf-8"))
    assert proof["values_off"] == 0
    assert proof["loss_merged"] < proof["loss_base"]
    weights = load_file(published(job) / "adapter" / "adapter_model.safetensors")
    if "FT_MODULES_TO_SAVE" in KINDS[kind]:
        assert any(name.endswith("embed_tokens.weight") for name in weights)
        base = AutoModelForCausalLM.from_pretrained(job.environment["FT_MODEL_NAME"])
        assert not (AutoModelForCausalLM.from_pretrained(published(job)).lm_head.weight == base.lm_head.weight).all()


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Conversations in which the assistant uses two words that no vocabulary has."""
    rows = [json.loads(line)["messages"] for line in LIGHTHOUSE.read_text(encoding="utf-8").splitlines()[:48]]
    for messages in rows:
        messages[-1]["content"] = f"<call>{messages[-1]['content'][:20]}</call>"
    file = tmp_path / "calls.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in rows), encoding="utf-8")
    return file


def tied(folder: Path, source: str) -> Path:
    """The model with one matrix for embedding and head."""
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["untied", "tied", "into the original base"])
def test_new_tokens_are_learned_merged_and_published(job: Job, calls: Path, tmp_path: Path, kind: str) -> None:
    if kind == "tied":
        job.environment["FT_MODEL_NAME"] = str(tied(tmp_path / "tied", job.environment["FT_MODEL_NAME"]))
    result = job.run(
        FT_NEW_TOKENS="<call>,</call>", FT_DATASET_NAME=str(calls), FT_SAMPLE_PROMPTS='["Use <call> now"]', FT_MAX_STEPS="8",
        FT_MERGE_BASE="original" if "original" in kind else "quantized",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(published(job))
    assert tokenizer.convert_tokens_to_ids(["<call>", "</call>"]) == [512, 513]
    assert tokenizer.encode("x<call>y", add_special_tokens=False)[1] == 512
    model = AutoModelForCausalLM.from_pretrained(published(job), dtype="float32")
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == 514
    adapter = load_file(published(job) / "adapter" / "adapter_model.safetensors")
    rows = next(value for name, value in adapter.items() if "embed_tokens" in name)
    assert torch.allclose(model.get_input_embeddings().weight[512:], rows, rtol=1e-2)
    assert not torch.allclose(rows[0], rows[1])  # both began as the mean
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "tied")
    assert json.loads((published(job) / "merge_proof.json").read_text(encoding="utf-8"))["values_off"] == 0


def test_embedding_and_head_that_are_one_matrix_stay_one(job: Job, tmp_path: Path) -> None:
    folder = tied(tmp_path / "tied", job.environment["FT_MODEL_NAME"])
    before = AutoModelForCausalLM.from_pretrained(folder)
    for names in ("embed_tokens", "lm_head,embed_tokens"):
        shutil.rmtree(job.environment["FT_OUTPUT_DIR"], ignore_errors=True)
        result = job.run(FT_MODEL_NAME=str(folder), FT_MODULES_TO_SAVE=names, FT_MAX_STEPS="4")
        assert result.code == 0, result.stderr
        merged = AutoModelForCausalLM.from_pretrained(published(job))
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        assert not (merged.lm_head.weight == before.lm_head.weight).all()

    result = job.run(FT_MODEL_NAME=str(folder), FT_MODULES_TO_SAVE="lm_head", FT_MAX_STEPS="4", FT_RUN_ID="another")
    assert result.code == 78
    assert "the same matrix as embed_tokens" in result.error["message"]


@pytest.mark.parametrize("kind", ["with directions and lengths", "with embedding and head in full", "with new tokens"])
def test_a_killed_training_goes_on_to_the_same_adapter(job: Job, kind: str, calls: Path) -> None:
    new = {"FT_NEW_TOKENS": "<call>,</call>", "FT_DATASET_NAME": str(calls)}
    options = {**KINDS.get(kind, new), "FT_STAGES": "train", "FT_SAVE_STEPS": "1"}
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
    ("settings", "wanted"),
    [
        ({"FT_MODULES_TO_SAVE": "down_proj"}, "is in 4 bits"),
        ({"FT_USE_DORA": "true", "FT_SHARDING": "full"}, "FT_USE_DORA=true and FT_SHARDING=full"),
        ({"FT_LORA_RANK_PATTERN": '{"q_proj": 8}', "FT_DECODER_LAYERS": "fused"}, "FT_LORA_RANK_PATTERN and FT_DECODER_LAYERS=fused"),
        ({"FT_NEW_TOKENS": "<a>,<a>"}, "names a token twice"),
        ({"FT_NEW_TOKENS": "<a>", "FT_MODULES_TO_SAVE": "lm_head"}, "unset one of them"),
        ({"FT_LORA_RANK_PATTERN": '{"q_proj": 0}'}, "FT_LORA_RANK_PATTERN"),
        ({"FT_LORA_ALPHA_PATTERN": "q_proj=3"}, "FT_LORA_ALPHA_PATTERN"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(
    settings: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=wanted):
        load_settings()


def test_a_new_token_that_is_there_already_is_refused(job: Job) -> None:
    result = job.run(FT_NEW_TOKENS="<call>,</s>")
    assert result.code == 78
    assert "'</s>', which is in the vocabulary already, as 2" in result.error["message"]
