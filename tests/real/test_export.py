"""Exports answer in llama.cpp as the merged model does, and a wrong one is refused. `make test-export` installs llama.cpp first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from job.data.templates import NAMED, load_tokenizer
from job.errors import InputError
from job.model.exports import obstacle
from tests.conftest import LIGHTHOUSE, ROOT, Job, published

pytestmark = pytest.mark.export

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True}),
    "other heads": ("Llama", {"head_dim": 32}),
    "linear": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "llama 3.1": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "yarn": ("Llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen 2": ("Qwen2", {}),
    "qwen 3": ("Qwen3", {"head_dim": 16}),
}  # fmt: skip


@pytest.fixture
def exported(make_run: Callable[..., Any], tiny_model: Path) -> Callable[..., Any]:
    """Export a merged model that lies in a folder. Returns the record of each format."""

    def export_it(source: Path, formats: str = "gguf-f16") -> list[dict[str, Any]]:
        from job.stages.export import export

        run = make_run(EXPORT=formats, SAMPLE_PROMPTS='["Who lit the lamp?", "Why is the sea blue at 12 o\'clock?"]')
        shutil.rmtree(run.paths.run_dir, ignore_errors=True)
        run.paths.stage_dir("merge").mkdir(parents=True)
        shutil.copytree(source, run.paths.merged_dir)
        config = json.loads((run.paths.merged_dir / "config.json").read_text(encoding="utf-8"))
        config.setdefault("torch_dtype", config.get("dtype", "float32"))
        (run.paths.merged_dir / "config.json").write_text(json.dumps(config), encoding="utf-8")
        export(run)
        found: list[dict[str, Any]] = json.loads(run.paths.exports_file.read_text(encoding="utf-8"))
        return found

    return export_it


def random_model(folder: Path, tiny_model: Path, kind: str, options: dict[str, Any], template: str) -> Path:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).half()
    if config.__dict__.get("attention_bias") or kind == "Qwen2":
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["llama-2", "chatml"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_of_every_architecture_answers_like_the_merged_model(
    kind: str, template: str, exported: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    (found,) = exported(random_model(tmp_path / "model", tiny_model, *KINDS[kind], NAMED[template]))
    assert found["mean_kl_nats"] < 1e-3
    assert found["answers"] == 2
    assert found["different_answers"] == 0
    assert found["same_prompts"] == found["prompts"] > 2


def test_a_sentencepiece_vocabulary_reads_prompts_like_the_tokenizer(
    exported: Callable[..., Any], tmp_path: Path
) -> None:
    records = exported(story_model(tmp_path / "model"), "gguf-f16,gguf-q8_0,gguf-q4_k_m")
    assert [record["format"] for record in records] == ["gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]
    assert all(record["same_prompts"] == record["prompts"] for record in records)
    assert records[0]["mean_kl_nats"] < 1e-4


def story_model(folder: Path) -> Path:
    """A model that was trained, with a SentencePiece vocabulary."""
    shutil.copytree(ROOT / "tests" / "golden" / "stories260K", folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"chat_template": NAMED["llama-2"]}), encoding="utf-8")
    return folder


def test_fp8_is_loaded_by_transformers_and_predicts_like_the_merged_model(
    exported: Callable[..., Any], make_run: Callable[..., Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    (found,) = exported(story_model(tmp_path / "model"), "fp8")
    assert 1e-6 < found["mean_kl_nats"] < 0.1
    (file,) = tmp_path.rglob("export/files/fp8/model.safetensors")
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    assert weights[name].dtype == torch.float8_e4m3fn
    original = load_file(tmp_path / "model" / "model.safetensors")[name].float()
    again = weights[name].float() * weights[f"{name}_scale"]
    assert float((again - original).norm() / original.norm()) < 0.04
    assert weights["model.embed_tokens.weight"].dtype == torch.float16


def test_fp8_with_another_scale_is_refused(
    exported: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.model.exports import fp8

    right = fp8._scales
    monkeypatch.setattr(
        fp8, "_rounded", lambda stored, name: (stored[name].float() / right(stored, name) / 2).to(torch.float8_e4m3fn)
    )
    with pytest.raises(InputError, match="fp8/ differs from the merged model"):
        exported(story_model(tmp_path / "model"), "fp8")


@pytest.mark.parametrize("fault", ["rotation", "beginning", "template", "a layer"])
def test_each_wrong_export_is_refused(
    fault: str, exported: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import GGUFWriter

    from job.model.exports import gguf_file

    folder = random_model(tmp_path / "model", tiny_model, "Llama", {}, NAMED["llama-2"])
    exported(folder)
    if fault == "rotation":
        monkeypatch.setattr(gguf_file, "interleaved", lambda values, heads: values)
    elif fault == "beginning":
        monkeypatch.setattr(
            GGUFWriter,
            "add_add_bos_token",
            lambda self, value: self.add_bool("tokenizer.ggml.add_bos_token", not value),
        )
    elif fault == "template":
        add = GGUFWriter.add_chat_template
        monkeypatch.setattr(
            GGUFWriter, "add_chat_template", lambda self, text: add(self, text.replace("[INST] ", "[INST]"))
        )
    else:
        name_of = gguf_file.Weights.__getitem__

        def exchanged(self: Any, name: str) -> Any:
            return name_of(self, name.replace("layers.0.mlp", "layers.1.mlp"))

        monkeypatch.setattr(gguf_file.Weights, "__getitem__", exchanged)
    with pytest.raises(InputError, match="differs from the merged model"):
        exported(folder)


def test_the_whole_job_publishes_the_exports_with_a_modelfile(job: Job) -> None:
    result = job.run(FT_EXPORT="gguf-q8_0", FT_MAX_STEPS="2", FT_CHAT_TEMPLATE="chatml")
    assert result.code == 0, result.stderr
    names = {path.name for path in published(job).iterdir()}
    assert {"tiny-lighthouse.Q8_0.gguf", "Modelfile", "model.safetensors"} <= names
    card = (published(job) / "README.md").read_text(encoding="utf-8")
    assert "`tiny-lighthouse.Q8_0.gguf`" in card
    assert "ollama create" in card


@pytest.mark.parametrize(
    ("config", "wanted"),
    [({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2"), ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic"}}, "dynamic")],
)  # fmt: skip
def test_what_cannot_be_written_is_known_from_the_config(config: dict[str, Any], wanted: str) -> None:
    assert wanted in str(obstacle(config, ("gguf-f16",)))
    assert obstacle(config, ()) is None


def test_a_tokenizer_that_gguf_files_cannot_hold_is_refused_before_the_training(
    make_run: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.stages import prepare

    monkeypatch.setattr(prepare, "limit_files", lambda free: None)
    shutil.copytree(tiny_model, tmp_path / "odd")
    file = tmp_path / "odd" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["byte_fallback"] = False
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[aeiou]"},
        "behavior": "Isolated",
        "invert": False,
    }
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    for formats in ("", "gguf-q8_0"):
        run = make_run(EXPORT=formats, DATASET_SPLIT="train[:4]", RUN_ID=f"run{formats}")
        run.paths.stage_dir("download").mkdir(parents=True)
        run.paths.model_dir.symlink_to(tmp_path / "odd")
        run.paths.dataset_dir.mkdir(parents=True)
        shutil.copy(LIGHTHOUSE, run.paths.dataset_dir)
        if not formats:
            prepare.prepare(run)
            continue
        with pytest.raises(InputError, match="splits text in a way"):
            prepare.prepare(run)
