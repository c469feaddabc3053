"""A base or an adapter that is not whole is refused before anything is trained on it; nothing is filled in at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from job.environment.adapter_settings import with_adapters_own
from job.errors import InputError
from job.guard.model_files import check_config
from job.model.adapters import with_adapter, with_adapter_alone
from job.model.loading import stored_dtype
from job.model.merge import Recipe, UnknownLayout, skeleton, write_merged_whole
from job.model.merge_proof import check_weights
from job.model.safetensors_files import Weights
from job.settings import Settings
from tests.conftest import compute_of, load_model
from tests.model.test_merge import base_is, merge, train_something

Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture
def variant(tiny_model: Path, tmp_path: Path, make_run_with_model: Callable[..., Any]) -> Callable[..., Any]:
    """A run whose base is the tiny model with edited weights and fields of config.json."""

    def make(edit: Edit | None = None, use_4bit: str = "false", **fields: Any) -> Any:
        folder = tmp_path / "variant"
        shutil.copytree(tiny_model, folder)
        if edit is not None:
            save_file(
                edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | fields
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        run = make_run_with_model(USE_4BIT=use_4bit, LORA_R="4")
        base_is(run, folder)
        return run

    return make


def without(*names: str) -> Edit:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


@pytest.mark.parametrize("use_4bit", ["true", "false"])
@pytest.mark.parametrize(
    ("edit", "fields", "named"),
    [
        (without("lm_head.weight"), {}, "lm_head.weight"),
        (without("model.layers.1.input_layernorm.weight"), {}, "model.layers.1.input_layernorm.weight"),
        (lambda tensors: {f"_orig_mod.{name}": value for name, value in tensors.items()}, {}, "lm_head.weight and 20 more"),
        (None, {"num_hidden_layers": 4}, "model.layers.2"),
    ],
)  # fmt: skip
def test_weights_that_the_files_lack_are_named_and_not_made_up(
    variant: Callable[..., Any], edit: Edit | None, fields: dict[str, Any], named: str, use_4bit: str
) -> None:
    run = variant(edit, use_4bit, **fields)
    with pytest.raises(InputError, match=f"its files lack {named}"):
        load_model(run, quantized=use_4bit == "true")


def test_a_head_that_config_json_ties_to_an_embedding_unlike_it_is_refused(variant: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="tie_word_embeddings"):
        load_model(variant(tie_word_embeddings=True), quantized=False)


def test_a_head_that_is_the_embedding_is_tied_as_config_json_says(variant: Callable[..., Any]) -> None:
    def same(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    model = load_model(variant(same, tie_word_embeddings=True), quantized=False)
    assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_tensors_that_no_model_reads_are_left_out_of_the_merged_one(
    variant: Callable[..., Any], tmp_path: Path
) -> None:
    others = {"model.layers.0.self_attn.k_scale": torch.tensor(1.0), "model.extra": torch.zeros(3, dtype=torch.uint16)}
    run = variant(lambda tensors: {**tensors, **others})
    train_something(run, tmp_path / "adapter")
    merge(run, tmp_path / "adapter", tmp_path / "merged")
    assert not set(others) & set(Weights(tmp_path / "merged"))
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == {name for name, _ in skeleton(run.paths.model_dir).named_parameters()}  # fmt: skip


def test_of_a_single_file_and_an_index_the_one_counts_that_transformers_reads(
    variant: Callable[..., Any], tmp_path: Path
) -> None:
    folder = variant().paths.model_dir.resolve()
    tensors = load_file(folder / "model.safetensors")
    other = "model-00001-of-00001.safetensors"
    save_file({name: value * 1.5 for name, value in tensors.items()}, folder / other, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, other)}), encoding="utf-8")  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(Weights(folder)["lm_head.weight"].float(), loaded.lm_head.weight)


def test_the_type_of_weights_is_their_own_where_config_json_does_not_say(variant: Callable[..., Any]) -> None:
    run = variant(lambda tensors: {name: value.half() for name, value in tensors.items()}, dtype=None, torch_dtype=None)
    assert stored_dtype(run.paths.model_dir) == torch.float16


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("use_4bit", ["true", "false"])
def test_a_mixture_of_experts_is_merged_though_its_files_name_weights_in_their_own_way(
    make_run_with_model: Callable[..., Any], tiny_model: Path, tmp_path: Path, kind: str, use_4bit: str
) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    experts = {"num_local_experts": 4} if kind == "mixtral" else {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **experts), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")  # fmt: skip
    run = make_run_with_model(USE_4BIT=use_4bit, LORA_R="4")
    base_is(run, tmp_path / "base")
    trained = train_something(run, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    with pytest.raises(UnknownLayout):
        merge(run, tmp_path / "adapter", tmp_path / "merged")
    compute = compute_of(run)
    recipe = Recipe(device=compute.device, held_in=compute.dtype, dtype=torch.float32, four_bit=None)
    write_merged_whole(trained, run.paths.model_dir, tmp_path / "merged", recipe)
    found = check_weights(trained, run.paths.model_dir, tmp_path / "merged", recipe)
    assert found.values_off == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    file = tmp_path / "merged" / "model.safetensors"
    save_file({**load_file(file), name: load_file(file)[name] * 1.01}, file, metadata={"format": "pt"})
    assert check_weights(trained, run.paths.model_dir, tmp_path / "merged", recipe).values_off > 0


@pytest.mark.parametrize("named", ["torch.bfloat16", "auto", "int8"])
def test_a_type_of_weights_that_transformers_does_not_know_is_refused_by_its_field(named: str) -> None:
    with pytest.raises(InputError, match="dtype is"):
        check_config({"dtype": named})


def test_a_model_whose_layers_are_transposed_is_refused_before_it_is_trained() -> None:
    with pytest.raises(InputError, match="gpt2, whose layers hold their weights transposed"):
        check_config({"model_type": "gpt2"})


# -- adapters ----------------------------------------------------------------------------------------------------------


def of_other_sizes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(value.shape[0], 2 * value.shape[1]) for name, value in tensors.items()}


@pytest.mark.parametrize("edit", [of_other_sizes, lambda tensors: dict(list(tensors.items())[1:]), None])
def test_an_adapter_that_is_damaged_or_of_another_base_is_no_bug_of_this_job(
    make_run_with_model: Callable[..., Any], edit: Edit | None, tmp_path: Path
) -> None:
    run = make_run_with_model(LORA_R="4", USE_4BIT="false")
    train_something(run, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if edit is None:
        file.write_bytes(b"")
    else:
        save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    for load in (
        lambda: with_adapter(tmp_path / "adapter", load_model(run, quantized=False)),
        lambda: with_adapter_alone(tmp_path / "adapter", skeleton(run.paths.model_dir)),
    ):
        with pytest.raises(InputError, match="does not fit its model") as caught:
            load()
        assert "made for FT_MODEL_NAME" in caught.value.hint


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_an_adapter_of_the_head_or_the_embedding_is_refused_when_it_is_fetched(target: str) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", target]}
    with pytest.raises(InputError, match=f"FT_ADAPTER_NAME=theirs: it adapts {target}"):
        with_adapters_own(Settings(adapter_name="theirs", _env_file=None), config)
