"""The merge against peft's own load, merge and save, in turns on this machine's CPU: `python -m benchmarks.merge FOLDER --shape 7b`.

Each merge is a process of its own. The time begins when its libraries are imported, and memory is the most that the process had in
anonymous pages (RssAnon), without what it maps from files. `quantized` and `peft-dequantized` give the model that QLoRA trained;
`original` and `peft` merge into the 16-bit base. The job's own merge also hashes what it writes; peft's does not. The proof
is not part of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
WAYS = ("quantized", "peft-dequantized", "original", "peft")
_REPEATED = 1 << 20  # random values, which repeat: drawing seven billion takes longer than the merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("make", *WAYS), help="what one of the processes does")
    options = parser.parse_args()
    folder = options.folder / options.shape
    if options.only == "make":
        return make(folder, options.shape)
    if options.only is not None:
        return print(json.dumps(merge(folder, options.only)))
    itself = [sys.executable, "-m", "benchmarks.merge", str(options.folder), "--shape", options.shape, "--only"]
    if not (folder / "adapter").is_dir():
        subprocess.run([*itself, "make"], check=True)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            done = subprocess.run([*itself, way], check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    for way, runs in found.items():
        seconds, memory = ([one[name] for one in runs] for name in ("seconds", "gib"))
        peer = found["peft-dequantized" if way in ("quantized", "peft-dequantized") else "peft"]
        peft = statistics.median(one["seconds"] for one in peer)
        print(
            f"{way:<17} {statistics.median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"{statistics.median(seconds) / peft:.2f} × peft, {max(memory):.2f} GiB"
        )
    return None


def make(folder: Path, shape: str) -> None:
    """A base with random weights in bfloat16, and an adapter of rank 64 on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **SHAPES[shape]), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    values = torch.randn(_REPEATED) * 0.02
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(_REPEATED):
            part.copy_(values[: len(part)])
    model.save_pretrained(folder / "base")
    config = LoraConfig(r=64, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    adapted.save_pretrained(folder / "adapter")


def merge(folder: Path, way: str) -> dict[str, float]:
    """Seconds and peak GiB of one merge in this process."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from job.model.compute import Compute
    from job.model.merge import Recipe, write_merged
    from job.settings import Settings

    target = folder / f"merged-{way}"
    shutil.rmtree(target, ignore_errors=True)
    most = [0.0]

    def watch() -> None:
        while True:
            most[0] = max(most[0], _anonymous_gib())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    began = time.monotonic()
    if way.startswith("peft"):
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        base = AutoModelForCausalLM.from_pretrained(
            folder / "base",
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=four_bit if way != "peft" else None,
        )
        if way != "peft":
            base = base.dequantize()
        PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(target)
    else:
        settings = Settings(device="cpu", merge_base=way)
        compute = Compute.of(settings, local_rank=0, config=json.loads((folder / "base" / "config.json").read_text()))
        recipe = Recipe.of(settings, compute, torch.bfloat16)
        write_merged(folder / "base", folder / "adapter", target, settings, recipe, compute)
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return {"seconds": round(seconds, 2), "gib": round(most[0], 2)}


def _anonymous_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 2**20


if __name__ == "__main__":
    main()
