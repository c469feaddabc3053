"""Rows per CPU second of the stage prepare, against a batched `map` with TRL's packing, in turns in one run.

    python -m benchmarks.prepare --model MODEL_FOLDER --rows 100000 --turns 3 [--form text|messages]

Each side is a process of its own that reads the same JSON lines, tokenizes them with labels, and packs them. The peer is
what TRL's documentation tells to do by hand: `load_dataset`, `map(batched=True)` with the tokenizer (and the chat
template's assistant mask for conversations), and `pack_dataset`. CPU seconds include children; memory is the peak of
the process and its children above what the imports alone take.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LENGTH = 1024
_WORDS = (
    "the lamp keeper lights a light at night while ships pass the rocks and waves break over old stone stairs "
    "where nobody has walked since autumn brought its storms again from far away islands beyond"
).split()


def rows_of(form: str, count: int) -> list[str]:
    """Rows of made-up sentences between 10 and 200 words, no two alike."""
    rng = random.Random(1)
    lines = []
    for number in range(count):
        text = f"Row {number}: " + " ".join(rng.choices(_WORDS, k=int(rng.triangular(10, 200, 30))))
        if form == "text":
            lines.append(json.dumps({"text": text}))
        else:
            turns = [{"role": "user", "content": f"What is row {number}?"}, {"role": "assistant", "content": text}]
            lines.append(json.dumps({"messages": turns}))
    return lines


def ours(model: Path, file: Path, form: str, folder: Path) -> int:
    from job.run import Run
    from job.settings import Settings
    from job.stages.prepare import prepare

    os.environ |= {
        "FT_MODEL_NAME": str(model), "FT_DATASET_NAME": str(file), "FT_OUTPUT_DIR": str(folder), "FT_RUN_ID": "benchmark", "FT_PACKING": "true",
        "FT_DEVICE": "cpu", "FT_MAX_SEQ_LENGTH": "256", "FT_TOO_LONG": "cut", "FT_STAGES": "train", "FT_CHAT_TEMPLATE": "chatml",
    }  # fmt: skip
    run = Run.of(Settings())
    run.paths.dataset_dir.mkdir(parents=True)
    (run.paths.dataset_dir / file.name).symlink_to(file)
    run.paths.model_dir.symlink_to(model)
    prepare(run)
    return int(json.loads(run.paths.data_report_file.read_text(encoding="utf-8"))["train"]["packed_rows"])


def peer(model: Path, file: Path, form: str, folder: Path) -> int:
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\n' }}{% endfor %}"
    )

    def texts(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer([text + tokenizer.eos_token for text in batch["text"]])["input_ids"]
        ids = [row[:256] for row in ids]
        return {"input_ids": ids, "labels": [list(row) for row in ids]}

    def conversations(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            batch["messages"], chat_template=marked, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        labels = [
            [token if mark else -100 for token, mark in zip(ids, marks, strict=True)][:256]
            for ids, marks in zip(found["input_ids"], found["assistant_masks"], strict=True)
        ]
        return {"input_ids": [ids[:256] for ids in found["input_ids"]], "labels": labels}

    cache = str(folder / "cache")
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
    function = texts if form == "text" else conversations
    done = rows.map(function, batched=True, remove_columns=rows.column_names, num_proc=min(2, os.cpu_count() or 1))
    packed = pack_dataset(done, 256, "bfd")
    packed.save_to_disk(folder / "packed")
    return len(packed)


def measure(side: str, arguments: argparse.Namespace, file: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.prepare", "--side", side, "--file", str(file), "--folder", folder, "--model", str(arguments.model), "--form", arguments.form]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:] + done.stdout[-2000:])
        return dict(json.loads(done.stdout.splitlines()[-1]))


def one_side(side: str, arguments: argparse.Namespace) -> None:
    work: Callable[..., int] = {"ours": ours, "peer": peer}[side]
    if side == "ours":
        import job.stages.prepare  # noqa: F401 (so that imports do not count)
    else:
        import datasets  # noqa: F401
        import trl.data_utils  # noqa: F401
    import transformers.models.llama.tokenization_llama  # noqa: F401

    before, base = _cpu(), _peak()
    began = time.monotonic()
    packed = work(arguments.model.absolute(), arguments.file, arguments.form, arguments.folder)
    record = {
        "packed": packed,
        "cpu": _cpu() - before,
        "seconds": time.monotonic() - began,
        "peak_mib": (_peak() - base) / 1024,
    }
    print(json.dumps(record))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def _peak() -> int:
    """KiB: of this process, and of its largest child."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--form", choices=["text", "messages"], default="text")
    parser.add_argument("--side", choices=["ours", "peer"])
    parser.add_argument("--file", type=Path)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        one_side(arguments.side, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("\n".join(rows_of(arguments.form, arguments.rows)) + "\n", encoding="utf-8")
        ratios = []
        for turn in range(arguments.turns):
            found = {side: measure(side, arguments, file) for side in ("peer", "ours")}
            ratios.append(found["peer"]["cpu"] / found["ours"]["cpu"])
            for side, record in found.items():
                rate = arguments.rows / record["cpu"]
                print(
                    f"turn {turn}, {side}: {rate:,.0f} rows/CPU s, {record['seconds']:.1f} s, peak +{record['peak_mib']:,.0f} MiB, {record['packed']:,.0f} packed rows"
                )
        print(
            f"{arguments.form}: {statistics.median(ratios):.2f} × the rows per CPU second ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
