"""Stage merge: download/model, train/adapter → merge/model, merge_proof.json, sha256.json."""

from __future__ import annotations

import gc
import math
import shutil
import time
from dataclasses import asdict
from typing import Any

import torch
from datasets import load_from_disk

from job.data.check import reading_of
from job.data.masking import checked_prompt
from job.data.report import learned_ends
from job.data.templates import load_tokenizer, vocabulary_of
from job.data.tokenizer_files import difference, publish_tokenizer
from job.errors import InputError
from job.model.adapters import with_adapter
from job.model.compute import Compute
from job.model.generation import add_ends, answer, greedy
from job.model.loading import load_base, stored_dtype
from job.model.merge import Recipe, UnknownLayout, write_merged, write_merged_whole
from job.model.merge_proof import Predictions, Rows, check_weights, load_as_a_user_would, same_beginnings
from job.report.events import message, output
from job.run import Run, read_json, write_json
from job.stages.turn import await_turn

_PROOF_ROWS, _PROOF_TOKENS = 8, 256
_PROOF_PROMPTS, _PROOF_ANSWER_TOKENS = 3, 48
# Largest mean KL in nats/token by what the adapter was merged into: rounding gives less than 0.001, and a wrong scale or a
# lost layer far more. A base that the adapter was not trained on differs as much as it does: the user asked for it
_MOST_KL = {"quantized": 0.02, "original": math.inf}


def merge(run: Run) -> None:
    """Write the merged model, read it back as a user would, and fail if it differs from the trained one."""
    await_turn(run, "merge")
    config = read_json(run.paths.model_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    recipe = Recipe.of(run.settings, compute, stored_dtype(run.paths.model_dir))
    tokens = vocabulary_of(load_tokenizer(run.paths.tokenizer_dir)) if run.settings.new_tokens else 0
    started = time.monotonic()
    shutil.rmtree(run.paths.merged_dir, ignore_errors=True)
    try:
        hashes = write_merged(
            run.paths.model_dir,
            run.paths.adapter_dir,
            run.paths.merged_dir,
            run.settings,
            recipe,
            compute,
            run.check_stop,
            tokens,
        )
    except UnknownLayout:
        hashes = {}
    else:
        write_json(
            run.paths.merged_hashes_file, {f"{run.paths.merged_dir.name}/{name}": hash for name, hash in hashes.items()}
        )
        message(f"Merged in {time.monotonic() - started:.1f} s.")
    base = load_base(run.paths.model_dir, run.settings, compute, quantized=run.settings.use_4bit, tokens=tokens)
    trained = with_adapter(run.paths.adapter_dir, base)
    if not hashes:
        write_merged_whole(trained, run.paths.model_dir, run.paths.merged_dir, recipe, tokens)
    publish_tokenizer(run.paths.model_dir, run.paths.tokenizer_dir, run.paths.merged_dir)
    add_ends(run.paths.merged_dir, learned_ends(run.paths.data_report_file))
    run.check_stop()
    started = time.monotonic()
    proof = prove(run, trained, recipe, compute)
    write_json(run.paths.merge_proof_file, proof)
    require_equal(run, proof)
    message(
        f"Merge verified in {time.monotonic() - started:.1f} s: KL {proof['mean_kl_nats']:.1e} nats/token, top-1 agreement {proof['same_first_choice']:.1%}, "
        f"{proof['same_answers']} of {proof['answers']} answers alike."
    )
    if run.settings.merge_base == "original":
        _tell_cost(proof)
    output("merged model", str(run.paths.merged_dir))


def prove(run: Run, trained: Any, recipe: Recipe, compute: Compute) -> dict[str, Any]:
    """Every figure of the proof. The trained model is freed on the way, since memory may not hold both."""
    rows, tokenizer = _rows(run), load_tokenizer(run.paths.tokenizer_dir)
    prompts = run.settings.sample_prompts[:_PROOF_PROMPTS]
    expected = Predictions.of(trained, rows)
    with trained.disable_adapter():
        loss_base = Predictions.of(trained, rows).loss(rows)
    ends = learned_ends(run.paths.data_report_file)
    trained.get_base_model().generation_config = greedy(trained.get_base_model(), ends)
    answers = _answers(run, trained, tokenizer, prompts)
    weights = check_weights(trained, run.paths.model_dir, run.paths.merged_dir, recipe, run.check_stop)
    dtype = next(parameter.dtype for parameter in trained.parameters() if parameter.is_floating_point())
    del trained
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    merged = load_as_a_user_would(run.paths.merged_dir, dtype, compute.device)
    merged.generation_config = greedy(merged)
    found = Predictions.of(merged, rows)
    return {
        **asdict(weights),
        **expected.distance_to(found),
        "loss_base": loss_base,
        "loss_trained": expected.loss(rows),
        "loss_merged": found.loss(rows),
        "answers": len(prompts),
        "same_answers": same_beginnings(answers, _answers(run, merged, tokenizer, prompts)),
        "tokenizer": difference(run.paths.merged_dir, tokenizer, prompts),
        "merged_into": run.settings.merge_base,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "rows": len(rows.ids),
        "tokens": sum(map(len, rows.ids)),
    }


def _tell_cost(proof: dict[str, Any]) -> None:
    """What it costs, or gains, that the adapter was merged into a base that it was not trained on."""
    trained, merged = proof["loss_trained"], proof["loss_merged"]
    if trained is not None:
        message(
            f"Merged into the original base, the model has a loss of {merged:.4f} nats/token on held-out rows; the trained one has {trained:.4f}.",
            "warning" if merged > trained else "info",
        )


def _rows(run: Run) -> Rows:
    """The first rows that were held out, or of the training data if none were."""
    data = load_from_disk(run.paths.eval_data_dir if run.paths.eval_data_dir.exists() else run.paths.train_data_dir)
    first = data[:_PROOF_ROWS]
    ids, labels = ([list(row)[:_PROOF_TOKENS] for row in first[name]] for name in ("input_ids", "labels"))
    return Rows(ids, labels)


def _answers(run: Run, model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[str]:
    answers = []
    for prompt in prompts:
        run.check_stop()
        answers.append(
            answer(model, tokenizer, checked_prompt(prompt, tokenizer, reading_of(run.settings)), _PROOF_ANSWER_TOKENS)
        )
    return answers


def require_equal(run: Run, proof: dict[str, Any]) -> None:
    """Raise InputError with the figures if the merged model is not the trained one."""
    limit = run.settings.merge_max_kl
    most = _MOST_KL[run.settings.merge_base] if limit == "auto" else limit
    faults = []
    if proof["values_off"]:
        faults.append(
            f"{proof['values_off']:,} values in {proof['weights_off']} weights differ by more than rounding, most in {proof['worst']}, by {proof['largest']:.2g} of its norm"
        )
    if not proof["mean_kl_nats"] <= most:
        faults.append(f"its predictions differ by KL {proof['mean_kl_nats']:.2g} nats/token, and {most:g} is the most")
    if proof["tokenizer"]:
        faults.append(f"its tokenizer differs: {proof['tokenizer']}")
    if faults:
        raise InputError(
            f"The merged model differs from the trained one: {'; '.join(faults)}.",
            f"It was not published, and the adapter is intact. The figures are in {run.paths.merge_proof_file}."
            + (" FT_MERGE_MAX_KL sets another limit." if faults[0].startswith("its predictions") else ""),
        )
