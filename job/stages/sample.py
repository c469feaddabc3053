"""Stage sample: download/model, train/adapter → sample/samples.json."""

from __future__ import annotations

from job.data.check import reading_of
from job.data.masking import checked_prompt
from job.data.report import learned_ends
from job.data.templates import load_tokenizer, vocabulary_of
from job.model.adapters import with_adapter
from job.model.compute import Compute
from job.model.generation import answer, greedy
from job.model.loading import load_base
from job.report.events import message, output, progress
from job.run import Run, read_json, write_json


def sample(run: Run) -> None:
    """Answer each prompt with the base and the tuned model, greedily, so that answers can be compared and repeated."""
    tokenizer = load_tokenizer(run.paths.tokenizer_dir)
    config = read_json(run.paths.model_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    base = load_base(
        run.paths.model_dir,
        run.settings,
        compute,
        quantized=run.settings.use_4bit,
        tokens=vocabulary_of(tokenizer) if run.settings.new_tokens else 0,
    )
    base.generation_config = greedy(base, learned_ends(run.paths.data_report_file))
    model = with_adapter(run.paths.adapter_dir, base)
    samples = []
    prompts = run.settings.sample_prompts
    for number, prompt in enumerate(prompts, 1):
        run.check_stop()
        ids = checked_prompt(prompt, tokenizer, reading_of(run.settings))
        with model.disable_adapter():
            before = answer(model, tokenizer, ids, run.settings.sample_max_new_tokens)
        after = answer(model, tokenizer, ids, run.settings.sample_max_new_tokens)
        samples.append({"prompt": prompt, "base": before, "tuned": after})
        progress(number, len(prompts), "prompts")
        message(f"{prompt}\n    before: {before}\n    after:  {after}")
    write_json(run.paths.samples_file, samples)
    output("answers", str(run.paths.samples_file))
