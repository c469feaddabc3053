"""The first losses of the default recipe on a small real model, to compare every later version with.

`python -m tests.golden` writes them anew, which is right only when a change of the numbers is meant and explained.
stories260K is a Llama that Andrej Karpathy trained on TinyStories (https://huggingface.co/karpathy/tinyllamas, MIT).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MODEL = Path(__file__).parent / "stories260K"
FILE = Path(__file__).parent / "losses.json"
STEPS = 20

SETTINGS = {
    "FT_MODEL_NAME": str(MODEL), "FT_DATASET_NAME": str(ROOT / "examples" / "lighthouse.jsonl"), "FT_DEVICE": "cpu",
    "FT_STAGES": "train", "FT_TRAIN_ON": "all", "FT_MAX_STEPS": str(STEPS), "FT_LOGGING_STEPS": "1", "FT_RUN_ID": "golden", "FT_LOG_FORMAT": "json",
    "FT_ENV_FILE": os.devnull, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def machine() -> str:
    """The processor and the library that computes on it: with both the same, so is every bit."""
    from importlib.metadata import version

    facts = ("cpu family", "model", "model name", "stepping", "flags")
    first = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in facts:
            first.setdefault(name, value)
    flags = hashlib.sha256(first.pop("flags", "").encode()).hexdigest()[:8]
    return f"{platform.machine()}, {', '.join(f'{name} {value}' for name, value in first.items())}, flags {flags}, torch {version('torch')}"


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []


def run(folder: Path, root: Path = ROOT) -> dict[str, Any]:
    """Train `STEPS` steps with the code below `root`; the losses and the hash of the adapter."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FT_", "SLURM_"))}
    done = subprocess.run(
        [sys.executable, str(root / "entrypoint.py")],
        env={**inherited, **SETTINGS, "FT_OUTPUT_DIR": str(folder)},
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    train = folder / "runs" / "golden" / "train"
    history = json.loads((train / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    adapter = (train / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "machine": machine(),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
    }


def recorded() -> Mapping[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))
