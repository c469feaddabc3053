"""Stage merge: download/model, train/adapter → merge/model, merge_proof.json."""

from __future__ import annotations

import gc

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from job.data.templates import load_tokenizer
from job.errors import InputError
from job.model.adapters import with_adapter
from job.model.compute import Compute
from job.model.loading import load_base, stored_dtype
from job.model.merge import compare_distributions, largest_difference, next_token_distributions, write_merged
from job.report.events import message, output
from job.run import Run, read_json, write_json
from job.stages.turn import await_turn

_PROOF_ROWS, _PROOF_TOKENS = 8, 256
_MOST_DIFFERENCE = 2**-7  # relative to a weight's norm; rounding to bfloat16 stays under 2^-8
_MOST_KL = 0.02  # nats/token; rounding gives less than 0.001, a wrong scale or a lost layer far more


def merge(run: Run) -> None:
    """Write the merged model, read it back as a user would, and fail if it differs from the trained one."""
    await_turn(run, "merge")
    config = read_json(run.paths.model_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    base = load_base(run.paths.model_dir, run.settings, compute, quantized=run.settings.use_4bit)
    trained = with_adapter(run.paths.adapter_dir, base)
    rows = load_from_disk(run.paths.eval_data_dir if run.paths.eval_data_dir.exists() else run.paths.train_data_dir)
    proof_rows = [list(ids)[:_PROOF_TOKENS] for ids in rows[:_PROOF_ROWS]["input_ids"]]
    expected = next_token_distributions(trained, proof_rows)
    run.check_stop()
    write_merged(trained, run.paths.merged_dir, stored_dtype(run.paths.model_dir))
    load_tokenizer(run.paths.tokenizer_dir).save_pretrained(run.paths.merged_dir)
    run.check_stop()
    layer, difference = largest_difference(trained, run.paths.merged_dir)
    dtype = next(parameter.dtype for parameter in base.parameters() if parameter.is_floating_point())
    del base, trained
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    merged = AutoModelForCausalLM.from_pretrained(
        run.paths.merged_dir, dtype=dtype, device_map={"": compute.device}
    ).eval()
    distance = compare_distributions(expected, next_token_distributions(merged, proof_rows))
    proof = {
        "largest_weight_difference": difference,
        "in_layer": layer,
        **distance,
        "rows": len(proof_rows),
        "tokens": sum(map(len, proof_rows)),
    }
    write_json(run.paths.merge_proof_file, proof)
    if not (difference <= _MOST_DIFFERENCE and distance["mean_kl_nats"] <= _MOST_KL):
        raise InputError(
            f"The merged model differs from the trained one: weights by {difference:.2g} of their norm (in {layer}), predictions by KL {distance['mean_kl_nats']:.2g} nats/token.",
            f"Nothing was published, and the adapter is intact. The figures are in {run.paths.merge_proof_file}.",
        )
    message(
        f"Merge verified: KL {distance['mean_kl_nats']:.1e} nats/token, top-1 agreement {distance['same_first_choice']:.1%}."
    )
    output("merged model", str(run.paths.merged_dir))
