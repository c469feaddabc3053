"""An adapter that fits no layer must not pass for the trained one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from job.errors import InputError
from job.model.adapters import lora_config, with_adapter
from tests.conftest import load_model


def test_an_adapter_whose_layers_have_other_names_is_refused_rather_than_ignored(
    make_run_with_model: Callable[..., Any],
) -> None:
    run = make_run_with_model(LORA_R="4")
    model = get_peft_model(load_model(run, quantized=True), lora_config(run.settings))
    model.save_pretrained(run.paths.adapter_dir)
    loaded = with_adapter(run.paths.adapter_dir, load_model(run, quantized=True))
    assert any("lora_A" in name for name, _ in loaded.named_parameters())

    file = run.paths.adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed: dict[str, torch.Tensor] = {
        name.replace(".self_attn", ".wrapped.self_attn"): value for name, value in tensors.items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="does not fit its model"):
        with_adapter(run.paths.adapter_dir, load_model(run, quantized=True))
