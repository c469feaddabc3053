"""Run another trainer on the benchmark's documents, in its own process, and print one JSON line.

    python -m benchmarks.peers NAME --model FOLDER --documents FOLDER --rows N …

Only this module imports the other trainers. Exit code 3 means that the trainer is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from typing import Any

from benchmarks.turns import Turn

WARM_UP_STEPS = 4
NOT_INSTALLED = 3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=("trl-notebook", "trl-liger", "unsloth"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", required=True, help="rows of input_ids, as saved by the job's prepare stage")
    parser.add_argument("--rows", type=int, required=True, help="rows per step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="run the notebook in bfloat16, like the other trainers")
    parser.add_argument("--memory-gib", type=float)
    parser.add_argument("--unpacked", action="store_true", help="batches of whole documents, grouped by length")
    parser.add_argument("--notebooks-lora", action="store_true", help="LoRA on queries and values, with dropout of 0.1")
    options = parser.parse_args()
    needed = {"unsloth": "unsloth", "trl-liger": "liger_kernel"}.get(options.name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        print(f"{needed} is not installed", file=sys.stderr)
        return NOT_INSTALLED
    began = time.perf_counter()
    print(json.dumps(_measure(options, began)), flush=True)
    return 0


def _measure(options: argparse.Namespace, began: float) -> dict[str, Any]:
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if options.name == "unsloth":
        import unsloth  # noqa: F401 - it must be imported first
    import torch
    from datasets import load_from_disk
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if options.memory_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * 2**30 / total)
    notebook = options.name == "trl-notebook"
    dtype = torch.float16 if notebook and not options.bfloat16 else torch.bfloat16
    turn = Turn.of_environment()
    if turn is not None:
        turn.await_("load")
    model, tokenizer, peft_config = _load(options, dtype, notebook)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    steps = options.steps + WARM_UP_STEPS if turn is None else turn.all_steps
    documents = load_from_disk(options.documents).select_columns(["input_ids"])
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "num_train_epochs": 100,
        "per_device_train_batch_size": options.rows, "learning_rate": 2e-4, "weight_decay": 0.001, "optim": "paged_adamw_32bit",
        "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_grad_norm": 0.3, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "max_length": options.length, "packing": not options.unpacked, "bf16": not notebook, "fp16": False, "seed": 42,
        "gradient_accumulation_steps": 1,  # unsloth has another default
        "use_liger_kernel": options.name == "trl-liger",
    }  # fmt: skip
    if options.name != "unsloth":
        arguments["gradient_checkpointing"] = options.recompute
    if options.unpacked:
        known = SFTConfig.__dataclass_fields__  # transformers 5 renamed group_by_length
        grouped = {"train_sampling_strategy": "group_by_length"} if "train_sampling_strategy" in known else {}
        arguments |= grouped or {"group_by_length": True}
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=documents, processing_class=tokenizer,
        peft_config=peft_config, callbacks=[Clock() if turn is None else turn.callback()],
    )  # fmt: skip
    tokens = _count_tokens(trainer, tokenizer, turn)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    if turn is not None:
        return {}
    seconds = marks[-1] - marks[WARM_UP_STEPS - 1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_per_second": sum(tokens[WARM_UP_STEPS:]) / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_seconds": marks[0] - began,
        "losses": [round(loss, 4) for loss in losses],
    }


_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _load(options: argparse.Namespace, dtype: Any, notebook: bool) -> tuple[Any, Any, Any]:
    if options.name == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            options.model, max_seq_length=options.length, load_in_4bit=True, dtype=dtype
        )
        model = FastLanguageModel.get_peft_model(
            model, r=64, lora_alpha=16, lora_dropout=0.1 if options.notebooks_lora else 0, bias="none",
            target_modules=["q_proj", "v_proj"] if options.notebooks_lora else _LINEAR,
            use_gradient_checkpointing="unsloth" if options.recompute else False,
        )  # fmt: skip
        return model, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    flash = importlib.util.find_spec("flash_attn") is not None
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, device_map={"": 0},
        attn_implementation="sdpa" if notebook else "flash_attention_2" if flash else "flex_attention",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )  # fmt: skip
    model.config.use_cache = False
    lora = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.1 if options.notebooks_lora else 0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"] if options.notebooks_lora else "all-linear",
    )  # fmt: skip
    return model, AutoTokenizer.from_pretrained(options.model), lora


def _count_tokens(trainer: Any, tokenizer: Any, turn: Turn | None) -> list[int]:
    """Count the tokens of each step's batches, without padding."""
    counts: list[int] = []
    step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        counts.append(int(mask.sum()) if mask is not None else int((ids != tokenizer.pad_token_id).sum()))
        if turn is not None:
            turn.count(counts[-1])
        return step(model, inputs, *rest, **named)

    trainer.training_step = counted
    return counts


if __name__ == "__main__":
    sys.exit(main())
