"""Stage sample: download/model, train/adapter → sample/samples.json."""

from __future__ import annotations

from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel

from job.data.masking import render_prompt
from job.data.templates import load_tokenizer
from job.errors import InputError, in_a_line
from job.guard.limits import time_limit
from job.model.adapters import with_adapter
from job.model.compute import Compute
from job.model.generation import greedy
from job.model.loading import load_base
from job.report.events import message, output, progress
from job.run import Run, read_json, write_json

_PROMPT_SECONDS = 20.0


def sample(run: Run) -> None:
    """Answer each prompt with the base and the tuned model, greedily, so that answers can be compared and repeated."""
    tokenizer = load_tokenizer(run.paths.tokenizer_dir)
    config = read_json(run.paths.model_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    base = load_base(run.paths.model_dir, run.settings, compute, quantized=run.settings.use_4bit)
    base.generation_config = greedy(base)
    model = with_adapter(run.paths.adapter_dir, base)
    samples = []
    prompts = run.settings.sample_prompts
    for number, prompt in enumerate(prompts, 1):
        run.check_stop()
        try:
            with time_limit(_PROMPT_SECONDS, "rendering a prompt in the model's chat template"):
                ids = render_prompt(prompt, tokenizer)
        except (TemplateError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(
                f"The chat template fails on a prompt of FT_SAMPLE_PROMPTS: {in_a_line(error)}",
                "Set FT_CHAT_TEMPLATE, or change the prompt.",
            ) from error
        with model.disable_adapter():
            before = answer(model, tokenizer, ids, run.settings.sample_max_new_tokens)
        after = answer(model, tokenizer, ids, run.settings.sample_max_new_tokens)
        samples.append({"prompt": prompt, "base": before, "tuned": after})
        progress(number, len(prompts), "prompts")
        message(f"{prompt}\n    before: {before}\n    after:  {after}")
    write_json(run.paths.samples_file, samples)
    output("answers", str(run.paths.samples_file))


@torch.inference_mode()
def answer(model: PeftModel, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> str:
    """The greedy continuation of `prompt_ids`, without special tokens."""
    ids = torch.tensor([prompt_ids], device=model.get_base_model().get_input_embeddings().weight.device)
    room = int(getattr(model.config, "max_position_embeddings", 0) or 2**20) - len(prompt_ids)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(max_new_tokens, room)),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    text: str = tokenizer.decode(generated[0, len(prompt_ids) :], skip_special_tokens=True)
    return text.strip()
