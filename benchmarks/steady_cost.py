"""What does keeping everything safe cost? The job of this version and of a former one, in turns, from their entrypoints.

    python -m benchmarks.steady_cost --former ../former-checkout --runs 2 --steps 50

A checkpoint every ten steps is hashed, made durable and stored beside the training. Prints, for each version, the median
and the 99th percentile of the time between two steps, and the seconds from the start of the process to its first step.
Without a GPU, `--device cpu` with FT_MODEL_NAME measures a small model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.training_speed import write_documents, write_model

ROOT = Path(__file__).parent.parent


def run(tree: Path, environment: dict[str, str]) -> dict[str, float]:
    """One whole start of the job of a checkout, up to the adapter."""
    began, stamps = time.monotonic(), []
    process = subprocess.Popen(
        [sys.executable, str(tree / "entrypoint.py")], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        event = json.loads(line)
        if event.get("event") == "progress" and event.get("stage") == "train" and event["done"] > last:
            last = event["done"]
            stamps.append(time.monotonic())
    if process.wait() != 0:
        raise SystemExit(f"{tree} ends with {process.returncode}")
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(stamps[5:]))
    return {
        "first step": stamps[0] - began,
        "median step": statistics.median(gaps),
        "p99 step": gaps[int(0.99 * (len(gaps) - 1))],
        "whole": time.monotonic() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--former", type=Path, required=True, help="a checkout of the version to compare with")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"former": [], "this": []}
    with tempfile.TemporaryDirectory(prefix="steady-") as scratch:
        top = Path(scratch)
        model = os.environ.get("FT_MODEL_NAME") or str(write_model("llama-2-7b", top / "model"))
        data = os.environ.get("FT_DATASET_NAME") or str(write_documents(top / "documents.jsonl"))
        for number in range(arguments.runs):
            for name, tree in (("former", arguments.former.resolve()), ("this", ROOT)):
                folder = top / f"{name}-{number}"
                environment = {
                    **os.environ, "FT_MODEL_NAME": model, "FT_DATASET_NAME": data, "FT_MAX_STEPS": str(arguments.steps),
                    "FT_STAGES": "preflight,download,prepare,train", "FT_LOG_FORMAT": "json", "FT_LOGGING_STEPS": "1",
                    "FT_SAVE_STEPS": "10", "FT_DEVICE": arguments.device, "FT_OUTPUT_DIR": str(folder), "FT_RUN_ID": "steady",
                    "FT_LORA_TARGET_MODULES": "all-linear", "FT_LORA_DROPOUT": "0", "FT_PACKING": "true", "FT_MAX_SEQ_LENGTH": "2048",
                    "FT_PER_DEVICE_TRAIN_BATCH_SIZE": "16", "FT_NUM_TRAIN_EPOCHS": "9", "HF_HUB_OFFLINE": "1",
                }  # fmt: skip
                results[name].append(run(tree, environment))
                print(name, {key: round(value, 4) for key, value in results[name][-1].items()}, flush=True)
                shutil.rmtree(folder, ignore_errors=True)
    print("| | former | this | ratio |")
    print("|---|---|---|---|")
    for figure in results["this"][0]:
        former, this = (statistics.median(item[figure] for item in results[name]) for name in ("former", "this"))
        print(f"| {figure}, s | {former:.4f} | {this:.4f} | {this / former:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
