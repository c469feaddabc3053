"""The proof of a merge passes the right one, and fails each wrong one that was thought of, also if the adapter changes little."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.data.templates import load_tokenizer
from job.data.tokenizer_files import publish_tokenizer
from job.errors import InputError
from job.model.merge import Recipe
from job.model.merge_proof import Predictions, Rows, same_beginnings
from job.stages.merge import prove, require_equal
from tests.conftest import compute_of
from tests.model.test_merge import merge, train_something

TEXT = "[INST] Who lit the lamp? [/INST] The keeper lit it."


@dataclass
class Merged:
    """A trained adapter and its right merge, which a test then damages."""

    run: Any
    trained: PeftModel
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return Path(self.run.paths.merged_dir)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors")

    def write(self, weights: dict[str, torch.Tensor]) -> None:
        whole = {name: value.contiguous() for name, value in weights.items()}
        save_file(whole, self.folder / "model.safetensors", metadata={"format": "pt"})

    def again(self, **recipe: Any) -> None:
        shutil.rmtree(self.folder)
        merge(self.run, self.run.paths.adapter_dir, self.folder, dtype=self.recipe.dtype, **recipe)
        publish_tokenizer(self.run.paths.model_dir, self.run.paths.tokenizer_dir, self.folder)

    def proof(self) -> dict[str, Any]:
        found = prove(self.run, self.trained, self.recipe, compute_of(self.run))
        require_equal(self.run, found)
        return found


@pytest.fixture(params=["a large change", "a small change"])
def merged(request: pytest.FixtureRequest, make_run_with_model: Callable[..., Any], tiny_model: Path) -> Merged:
    """In bfloat16. The small change moves weights by about a rounding, and predictions by next to nothing."""
    run = make_run_with_model(SAMPLE_PROMPTS='["Who lit the lamp?", "And why?"]')
    small = request.param == "a small change"
    trained = train_something(run, run.paths.adapter_dir, **({"lora_alpha": 0.1} if small else {}))
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
    tokenizer.save_pretrained(run.paths.tokenizer_dir)
    ids = [tokenizer.encode(TEXT), tokenizer.encode(TEXT[7:])]
    Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(run.paths.eval_data_dir)
    compute = compute_of(run)
    found = Merged(run, trained, Recipe.of(run.settings, compute, torch.bfloat16))
    found.folder.mkdir(parents=True)
    found.again()
    return found


def test_the_right_merge_passes_and_its_figures_say_how_close_it_is(merged: Merged) -> None:
    proof = merged.proof()
    assert proof["values_off"] == 0
    assert 0 < proof["largest"] < 2**-8
    assert proof["mean_kl_nats"] < 1e-3
    assert proof["answers"] == 2 and 0 <= proof["same_answers"] <= 2  # a random model is often undecided
    assert abs(proof["loss_merged"] - proof["loss_trained"]) < 1e-2
    assert proof["loss_base"] != proof["loss_trained"]
    assert proof["tokenizer"] is None


def nothing_was_added(merged: Merged) -> None:
    with merged.trained.disable_adapter():
        pass
    base = merged.recipe
    shutil.rmtree(merged.folder)
    silent = merged.run.paths.run_dir / "silent"
    shutil.copytree(merged.run.paths.adapter_dir, silent)
    tensors = load_file(silent / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, silent / "adapter_model.safetensors")
    merge(merged.run, silent, merged.folder, dtype=base.dtype)
    publish_tokenizer(merged.run.paths.model_dir, merged.run.paths.tokenizer_dir, merged.folder)


def another_alpha(merged: Merged) -> None:
    file = merged.run.paths.adapter_dir / "adapter_config.json"
    text = file.read_text(encoding="utf-8")
    config = json.loads(text)
    file.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 2}), encoding="utf-8")
    merged.again()
    file.write_text(text, encoding="utf-8")


def one_layer_left_out(merged: Merged) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    weights, right = merged.weights, merged.weights
    nothing_was_added(merged)
    right[name] = merged.weights[name]
    merged.write(right)
    assert not torch.equal(weights[name], right[name])


def a_transposed_change(merged: Merged) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    right = merged.weights
    nothing_was_added(merged)
    base = merged.weights[name].float()
    right[name] = (base + (right[name].float() - base).T).bfloat16()
    merged.write(right)


def a_head_that_was_dropped(merged: Merged) -> None:
    merged.write({name: value for name, value in merged.weights.items() if name != "lm_head.weight"})


def another_base(merged: Merged) -> None:
    link = merged.run.paths.model_dir
    other = merged.run.paths.run_dir / "other-base"
    model = AutoModelForCausalLM.from_pretrained(link)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    shutil.copytree(link, other)
    model.save_pretrained(other)
    target = link.readlink()
    link.unlink()
    link.symlink_to(other)
    merged.again()
    link.unlink()
    link.symlink_to(target)


def an_infinite_value(merged: Merged) -> None:
    weights = merged.weights
    weights["model.layers.1.self_attn.o_proj.weight"][5, 5] = float("inf")
    merged.write(weights)


def a_value_that_is_no_number(merged: Merged) -> None:
    weights = merged.weights
    weights["model.norm.weight"][0] = float("nan")
    merged.write(weights)


def two_layers_exchanged(merged: Merged) -> None:
    weights = merged.weights
    one, other = (f"model.layers.{number}.mlp.gate_proj.weight" for number in (0, 1))
    weights[one], weights[other] = weights[other].clone(), weights[one].clone()
    merged.write(weights)


def base_without_4_bits(merged: Merged) -> None:
    merged.again(held_in=None, four_bit=None)


def another_tokenizer(merged: Merged) -> None:
    file = merged.folder / "tokenizer.json"
    text = json.loads(file.read_text(encoding="utf-8"))
    text["model"]["merges"] = text["model"]["merges"][::-1]
    file.write_text(json.dumps(text), encoding="utf-8")


def another_template(merged: Merged) -> None:
    file = merged.folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["chat_template"] = config["chat_template"].replace("[INST] ", "[INST]  ")
    file.write_text(json.dumps(config), encoding="utf-8")


def another_end(merged: Merged) -> None:
    file = merged.folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"eos_token": "<unk>"}), encoding="utf-8")


@pytest.mark.parametrize(
    "fault",
    [
        nothing_was_added, another_alpha, one_layer_left_out, a_transposed_change, a_head_that_was_dropped, another_base, an_infinite_value,
        a_value_that_is_no_number, two_layers_exchanged, base_without_4_bits, another_tokenizer, another_template, another_end,
    ],
)  # fmt: skip
def test_each_fault_fails_the_proof(merged: Merged, fault: Callable[[Merged], None]) -> None:
    merged.proof()
    fault(merged)
    with pytest.raises(InputError, match=r"The merged model (differs|lacks|cannot be loaded)") as raised:
        merged.proof()
    assert "adapter is intact" in str(raised.value.hint)


def test_of_a_merge_into_the_original_base_the_weights_are_proved_and_the_predictions_told(
    make_run_with_model: Callable[..., Any], merged: Merged
) -> None:
    for fault in (None, two_layers_exchanged, nothing_was_added):
        original = Recipe(device=merged.recipe.device, held_in=None, four_bit=None, dtype=torch.bfloat16)
        shutil.rmtree(merged.folder)
        merged.folder.mkdir()
        merged.again(held_in=None, four_bit=None)
        merged.recipe = original
        object.__setattr__(merged.run.settings, "__dict__", {**merged.run.settings.__dict__, "merge_base": "original"})
        if fault is None:
            proof = merged.proof()
            assert proof["values_off"] == 0
            assert proof["mean_kl_nats"] > 1e-3
        else:
            fault(merged)
            with pytest.raises(InputError):
                merged.proof()


def test_the_limit_of_the_divergence_can_be_set(merged: Merged, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = merged.proof()
    settings = merged.run.settings
    object.__setattr__(settings, "__dict__", {**settings.__dict__, "merge_max_kl": proof["mean_kl_nats"] / 2})
    with pytest.raises(InputError, match="is the most") as raised:
        require_equal(merged.run, proof)
    assert "FT_MERGE_MAX_KL" in str(raised.value.hint)


def test_the_loss_counts_learned_tokens_alone() -> None:
    even = torch.log_softmax(torch.zeros(3, 4), -1)
    certain = torch.log_softmax(torch.tensor([[100.0, 0, 0, 0]] * 3), -1)
    rows = Rows([[1, 0, 0], [1, 0, 0]], [[-100, -100, 2], [-100, 0, -100]])
    assert Predictions([even, certain]).loss(rows) == pytest.approx(torch.log(torch.tensor(4.0)).item() / 2)
    assert Predictions([even]).loss(Rows([[1, 0, 0]], [[-100, -100, -100]])) is None


def test_answers_of_different_lengths_are_compared_as_far_as_both_go() -> None:
    assert same_beginnings(["a b c", "a b", "x"], ["a b", "a b c", "y"]) == 2
