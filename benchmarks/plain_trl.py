"""A plain TRL script with the notebook's settings, to compare the job's training with, step by step.

    python benchmarks/plain_trl.py MODEL TRAIN_FILE EVAL_FILE OUT.json [--steps N] [--all-linear] [--length N] [--device cpu]

It uses nothing from this project. TRAIN_FILE is Parquet or JSONL with a `text` column in the format
`<s>[INST] … [/INST] … </s>`. EVAL_FILE is the same, or `-` for none. A leading `<s>` is removed from the text because
the tokenizer adds one: otherwise every row would start with two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train_file")
    parser.add_argument("eval_file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--all-linear", action="store_true", help="all linear layers, alpha 64, learning rate 1e-3")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        device_map={"": 0 if on_gpu else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=arguments.steps,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_checkpointing=on_gpu,
            max_grad_norm=0.3,
            learning_rate=1e-3 if arguments.all_linear else 2e-4,
            weight_decay=0.001,
            optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            train_sampling_strategy="group_by_length",
            max_length=arguments.length,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            eval_on_start=arguments.eval_file != "-",
            save_strategy="no",
            report_to="none",
            seed=42,
        ),
        train_dataset=_rows(arguments.train_file),
        eval_dataset=_rows(arguments.eval_file) if arguments.eval_file != "-" else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=64,
            lora_alpha=64 if arguments.all_linear else 16,
            lora_dropout=arguments.dropout,
            target_modules="all-linear" if arguments.all_linear else None,
            task_type="CAUSAL_LM",
        ),
    )
    if not on_gpu:  # trl casts the adapter to bfloat16 even when the products are float32
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    arguments.out.write_text(json.dumps({"losses": losses, "evaluations": evaluations}), encoding="utf-8")
    print(f"{len(losses)} steps, loss {losses[0]:.4f} → {losses[-1]:.4f}, evaluation {evaluations}")


def _rows(file: str) -> Dataset:
    kind = "parquet" if file.endswith(".parquet") else "json"
    rows = load_dataset(kind, data_files=file, split="train").select_columns("text")
    return rows.map(lambda text: {"text": text.removeprefix("<s>")}, input_columns="text")


if __name__ == "__main__":
    main()
