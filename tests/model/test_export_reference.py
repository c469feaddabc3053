"""What exports are compared with: the merged model's own likeliest tokens, and the weights that belong in a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from job.model.compute import Compute
from job.model.safetensors_files import Weights
from job.stages.export import _Reference


@pytest.mark.parametrize("prompts", [["Who lit the lamp?", "Why?"], []])
def test_answers_are_the_likeliest_tokens_whatever_the_model_says_of_sampling(
    make_run: Callable[..., Any], tiny_model: Path, prompts: list[str]
) -> None:
    run = make_run(SAMPLE_PROMPTS=json.dumps(prompts), CHAT_TEMPLATE="chatml")
    run.paths.stage_dir("merge").mkdir(parents=True)
    shutil.copytree(tiny_model, run.paths.merged_dir)
    punishing = {"do_sample": True, "repetition_penalty": 5.0, "eos_token_id": 2}
    (run.paths.merged_dir / "generation_config.json").write_text(json.dumps(punishing))
    if not (run.paths.merged_dir / "chat_template.jinja").exists():
        from job.data.templates import NAMED

        (run.paths.merged_dir / "chat_template.jinja").write_text(NAMED["chatml"], encoding="utf-8")
    compute = Compute.of(run.settings, local_rank=0, config=json.loads((tiny_model / "config.json").read_text()))
    reference = _Reference(run, compute)
    assert (
        reference.begins
    )  # every prompt begins with the token for that, also where there is none of FT_SAMPLE_PROMPTS
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").eval()
    for prompt, answer in zip(reference.prompts, reference.answers, strict=True):
        ids = list(prompt)
        for token in answer:
            with torch.inference_mode():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
    assert any(len(answer) > 3 for answer in reference.answers)


def test_buffers_that_older_checkpoints_hold_are_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file(
        {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, metadata={"format": "pt"}
    )
    assert set(Weights(tmp_path / "model")) == set(weights)
