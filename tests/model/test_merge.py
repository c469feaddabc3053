"""The merged model is the trained one, and a merge that differs is detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.model.adapters import lora_config
from job.model.merge import (
    adapted_layers,
    compare_distributions,
    largest_difference,
    next_token_distributions,
    write_merged,
)
from tests.conftest import load_model

ROWS = [[1, 40, 41, 42, 43, 2], [1, 100, 101, 102, 2]]


@pytest.fixture(params=["nf4", "nested fp4", "16 bit"])
def trained(request: pytest.FixtureRequest, make_run_with_model: Callable[..., Any]) -> Any:
    """The tiny model with an adapter that changes its answers a lot."""
    settings = {
        "nf4": {},
        "nested fp4": {"USE_NESTED_QUANT": "true", "BNB_4BIT_QUANT_TYPE": "fp4"},
        "16 bit": {"USE_4BIT": "false"},
    }[request.param]
    run = make_run_with_model(LORA_R="4", LORA_TARGET_MODULES="all-linear", **settings)
    model = get_peft_model(load_model(run, quantized=run.settings.use_4bit), lora_config(run.settings)).eval()
    torch.manual_seed(1)
    for layer in adapted_layers(model):
        torch.nn.init.normal_(layer.module.lora_B["default"].weight, std=0.1)
    return model


def test_plain_transformers_loads_the_merged_model_and_it_answers_as_trained(trained: Any, tmp_path: Path) -> None:
    write_merged(trained, tmp_path / "merged", torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    figures = compare_distributions(next_token_distributions(trained, ROWS), next_token_distributions(merged, ROWS))
    assert figures["mean_kl_nats"] < 1e-6
    assert figures["same_first_choice"] == 1.0
    with trained.disable_adapter():
        untrained = next_token_distributions(trained, ROWS)
    control = compare_distributions(untrained, next_token_distributions(merged, ROWS))
    assert control["mean_kl_nats"] > 0.02  # the adapter matters, so the comparison above means something


def test_the_merged_folder_does_not_mention_4_bits_and_everyone_may_read_it(trained: Any, tmp_path: Path) -> None:
    write_merged(trained, tmp_path / "merged", torch.bfloat16)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_rounding_to_bfloat16_stays_within_the_verified_bound_and_a_wrong_weight_does_not(
    trained: Any, tmp_path: Path
) -> None:
    write_merged(trained, tmp_path, torch.bfloat16)
    assert 0 < largest_difference(trained, tmp_path)[1] < 2**-8
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3] *= -1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    layer, difference = largest_difference(trained, tmp_path)
    assert layer == name
    assert difference > 2**-7
    tensors[name][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not largest_difference(trained, tmp_path)[1] <= 2**-7
