"""Compare the job's training speed with other trainers', on one GPU and one workload: `make bench-gpu`.

Every variant runs in its own process. The variants take turns, so that a card that heats up does so for all: one run after
another, or with `--side-by-side` some steps each while the others wait (`benchmarks/turns.py`). Padding is not counted as
tokens. Without `--model`, a model of `--shape` with random weights is written first, since speed does not
depend on what a model knows. Without `--dataset`, the documents are random letters with guanaco's lengths (log-normal, 16 to 2048
tokens).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import WARM_UP_STEPS
from benchmarks.shapes import SHAPES
from benchmarks.turns import Player, Windows, conduct

ROOT = Path(__file__).parent.parent
_GROUP = (
    50  # rows grouped by length come in groups of 50 batches, longest first: fewer steps would measure only long rows
)
_PLAIN = {"FT_DECODER_LAYERS": "plain", "FT_PADDING_FREE": "false"}
_NOTEBOOKS = ("--unpacked", "--notebooks-lora")
_OURS: dict[str, str] = {"FT_LORA_TARGET_MODULES": "all-linear", "FT_LORA_DROPOUT": "0"}


@dataclass
class Variant:
    """One line of the table: the job with `settings`, or another trainer with `arguments`."""

    name: str
    rows: int
    settings: dict[str, str] = field(default_factory=dict)
    peer: str | None = None
    arguments: tuple[str, ...] = ()
    packed: bool = True
    whole: bool = False  # the job from its entrypoint, with preflight, download and data


def variants() -> list[Variant]:
    found = [
        Variant("job", 16, _OURS),
        Variant("unsloth", 16, peer="unsloth"),
        Variant("job, fp8", 16, {**_OURS, "FT_FROZEN_PRECISION": "fp8"}),
        Variant("job, 8 rows", 8, _OURS),
        Variant("job, fp8, 8 rows", 8, {**_OURS, "FT_FROZEN_PRECISION": "fp8"}),
        Variant("unsloth, 8 rows", 8, peer="unsloth"),
        Variant("job, 4 rows", 4, _OURS),
        Variant("unsloth, 4 rows", 4, peer="unsloth"),
        Variant("job, 1 row", 1, _OURS),
        Variant("unsloth, 1 row", 1, peer="unsloth"),
        Variant("TRL, Liger, recomputing", 8, peer="trl-liger", arguments=("--recompute",)),
        Variant("job, default recipe", 4, packed=False),
        Variant("job, default recipe, kernel by kernel", 4, {"FT_CUDA_GRAPHS": "false"}, packed=False),
        Variant("job from its entrypoint, default recipe", 4, packed=False, whole=True),
        Variant("job, default recipe, plain layers", 4, _PLAIN, packed=False),
        Variant("TRL, notebook", 4, peer="trl-notebook", arguments=("--recompute", *_NOTEBOOKS), packed=False),
        Variant(
            "TRL, notebook in bfloat16",
            4,
            peer="trl-notebook",
            arguments=("--recompute", "--bfloat16", *_NOTEBOOKS),
            packed=False,
        ),
        Variant("unsloth, default recipe", 4, peer="unsloth", arguments=_NOTEBOOKS, packed=False),
        Variant("unsloth, default recipe, all linear", 4, peer="unsloth", arguments=("--unpacked",), packed=False),
    ]
    for gib in (8, 16, 40):
        found.append(Variant(f"job, {gib} GiB", 8, {**_OURS, "FT_GPU_MEMORY_GIB": str(gib)}))
        rows, recompute = {8: (4, True), 16: (16, True), 40: (4, False)}[gib]
        found.append(
            Variant(
                f"unsloth, {gib} GiB", rows, peer="unsloth",
                arguments=("--memory-gib", str(gib), *(("--recompute",) if recompute else ())),
            )
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder (default: a 7B shape is written)")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="the model to write without --model")
    parser.add_argument("--dataset", type=Path, help="a dataset file or folder (default: documents are generated)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per packed row")
    parser.add_argument("--longest", type=int, help="tokens of the longest document (default: a whole row)")
    parser.add_argument("--folder", type=Path, default=Path("results/benchmark"), help="where everything is written")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--steps",
        type=int,
        help="measured steps per run (default: 12, or a whole group of batches if grouped by length)",
    )
    parser.add_argument("--side-by-side", action="store_true", help="start all variants, and let them train in turns")
    parser.add_argument("--limit", type=float, default=600, help="seconds for a variant to start, if side by side")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--peers-path", help="PYTHONPATH for the other trainers, if they need other package versions")
    options = parser.parse_args()
    known = {variant.name: variant for variant in variants()}
    wanted = [known[name] for name in options.only.split(";")] if options.only else list(known.values())
    longest = options.longest or options.length
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = options.folder.absolute()
    options.model = (options.model or write_model(options.shape, options.folder / f"{options.shape}-shape")).absolute()
    options.dataset = (
        options.dataset or write_documents(options.folder / f"documents-{longest}.jsonl", longest)
    ).absolute()
    kinds = {False, *(variant.packed for variant in wanted if not variant.peer)}
    with ThreadPoolExecutor() as pool:
        prepared = dict(zip(kinds, pool.map(lambda packed: _prepare(options, packed), kinds), strict=True))
    results: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in wanted}
    found = _side_by_side(wanted, options, prepared) if options.side_by_side else _one_by_one(wanted, options, prepared)
    for name, result in found:
        results[name].append(result)
        line = json.dumps({"variant": name, **result})
        print(line, flush=True)
        with (options.folder / "results.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")  # keeps the measurements if this process is cut off
    print(table(results))
    return 0


def _one_by_one(
    wanted: list[Variant], options: argparse.Namespace, prepared: dict[bool, Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for _ in range(options.runs):
        for variant in wanted:
            result = _run(variant, options, prepared)
            if result is not None:
                yield variant.name, result


def _side_by_side(
    wanted: list[Variant], options: argparse.Namespace, prepared: dict[bool, Path]
) -> Iterator[tuple[str, dict[str, Any]]]:
    players = []
    for variant in wanted:
        if variant.packed:
            windows = Windows(WARM_UP_STEPS, options.runs, _steps(variant, options), lead=2)
        else:  # whole groups of batches
            windows = Windows(_GROUP, options.runs, _GROUP, lead=0, releases=False)
        if variant.peer is not None:
            command, environment = _of_peer(variant, options, prepared)
        else:
            name = _name(variant)
            shutil.copytree(prepared[variant.packed], options.folder / "runs" / name, symlinks=True)
            command = [sys.executable, "-m", "benchmarks.turns"]
            environment = _of_job(variant, options, name, windows.all_steps)
        capped = "GIB" in " ".join(variant.settings) or "--memory-gib" in variant.arguments
        players.append(Player(variant.name, command, environment, windows, waits=not capped))
    for name, figures in conduct(players, options.folder / f"turns-{time.time_ns()}", options.limit):
        rate = figures["tokens"] / figures["seconds"]
        yield name, {"tokens_per_second": rate, "peak_bytes": figures["peak_bytes"], **figures}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The medians as a Markdown table, one line per variant."""
    lines = ["| variant | tokens/s | peak GiB | start to first step, s | runs |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        if not runs:
            lines.append(f"| {name} | not installed, or failed | | | 0 |")
            continue
        rates, peaks, firsts = (
            [run[key] for run in runs if key in run]
            for key in ("tokens_per_second", "peak_bytes", "first_step_seconds")
        )
        rate = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        first = f"{statistics.median(firsts):.1f}" if firsts else ""
        lines.append(f"| {name} | {rate} | {statistics.median(peaks) / 2**30:.1f} | {first} | {len(runs)} |")
    return "\n".join(lines)


def _steps(variant: Variant, options: argparse.Namespace) -> int:
    return int(options.steps or (12 if variant.packed else _GROUP - WARM_UP_STEPS))


def _run(variant: Variant, options: argparse.Namespace, prepared: dict[bool, Path]) -> dict[str, Any] | None:
    if variant.peer is None:
        return _run_job(variant, options, prepared[variant.packed])
    command, environment = _of_peer(variant, options, prepared)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{variant.name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", file=sys.stderr, flush=True)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _of_peer(
    variant: Variant, options: argparse.Namespace, prepared: dict[bool, Path]
) -> tuple[list[str], dict[str, str]]:
    """Another trainer's command and environment."""
    assert variant.peer is not None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if options.peers_path:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [options.peers_path, os.environ.get("PYTHONPATH"), str(ROOT)])
        )
    command = [
        sys.executable, "-m", "benchmarks.peers", variant.peer, "--model", str(options.model),
        "--documents", str(prepared[False] / "prepare" / "train"), "--rows", str(variant.rows),
        "--steps", str(_steps(variant, options)), "--length", str(options.length), *variant.arguments,
    ]  # fmt: skip
    return command, environment


def _settings(options: argparse.Namespace, run_id: str, packed: bool) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("FT_")},
        "FT_ENV_FILE": os.devnull, "HF_HUB_OFFLINE": "1", "FT_MODEL_NAME": str(options.model),
        "FT_DATASET_NAME": str(options.dataset), "FT_OUTPUT_DIR": str(options.folder), "FT_RUN_ID": run_id,
        "FT_MAX_SEQ_LENGTH": str(options.length), "FT_PACKING": str(packed).lower(), "FT_LOG_FORMAT": "json",
        "FT_SAVE_STEPS": "1000000", "FT_NPROC_PER_NODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip


def _prepare(options: argparse.Namespace, packed: bool) -> Path:
    """Prepare the data with the job's own stages. The other trainers get the same documents."""
    name = f"{'packed' if packed else 'documents'}-{options.length}-{Path(options.dataset).stem}"
    environment = {**_settings(options, name, packed), "FT_STAGES": "preflight,prepare"}
    subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py")], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return Path(options.folder) / "runs" / name


def _run_job(variant: Variant, options: argparse.Namespace, prepared: Path) -> dict[str, Any] | None:
    name = _name(variant)
    folder = Path(options.folder) / "runs" / name
    if not variant.whole:
        shutil.copytree(prepared, folder, symlinks=True)
    environment = _of_job(variant, options, name, _steps(variant, options) + WARM_UP_STEPS)
    stage = [str(ROOT / "entrypoint.py")] if variant.whole else ["-m", "job.stages", "train"]
    done = subprocess.run([sys.executable, *stage], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"{variant.name}: {done.stdout[-600:]}{done.stderr[-300:]}", file=sys.stderr, flush=True)
        return None
    metrics, state = (
        json.loads((folder / "train" / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "trainer_state.json")
    )
    shutil.rmtree(folder)
    goodput = metrics["goodput"]
    return {
        "tokens_per_second": _rate_after_warm_up(done.stdout) or goodput["tokens_per_second"],
        "peak_bytes": metrics["peak_memory_bytes"],
        "allocator_retries": metrics["allocator_retries"],
        "first_step_seconds": goodput["first_step_after_seconds"],
        "seconds": goodput["seconds"],
        "losses": [round(entry["loss"], 4) for entry in state["log_history"] if "loss" in entry],
        "part_of_matmul_rate": goodput.get("part_of_matmul_rate"),
        "plan": metrics["plan"],
    }


def _name(variant: Variant) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{variant.name} {time.time_ns()}".lower())


def _of_job(variant: Variant, options: argparse.Namespace, name: str, steps: int) -> dict[str, str]:
    """The job's environment."""
    return {
        **_settings(options, name, variant.packed), **variant.settings, "FT_MAX_STEPS": str(steps),
        "FT_PER_DEVICE_TRAIN_BATCH_SIZE": str(variant.rows), "FT_LOGGING_STEPS": "1", "FT_STAGES": "train",
        "JOB_BEGAN": str(time.time()), "JOB_STAGE_BEGAN": str(time.time()),
    }  # fmt: skip


def _rate_after_warm_up(output: str) -> float | None:
    """Tokens per second of the same steps as the other trainers', from the stage's events, which come at every step.

    The job's own figure begins after the first step, and may hold the compilation of kernels for another kind of batch.
    """
    steps: dict[int, tuple[float, float]] = {}
    for line in output.splitlines():
        event = json.loads(line) if line.startswith('{"event": "progress"') else {}
        if event.get("tokens_per_second"):
            steps[event["done"]] = event["tokens"], event["tokens_per_second"]
    tokens, seconds = 0.0, 0.0
    for step in range(WARM_UP_STEPS + 1, max(steps, default=0) + 1):
        if step not in steps or step - 1 not in steps:
            return None
        of_step = steps[step][0] - steps[step - 1][0]
        tokens, seconds = tokens + of_step, seconds + of_step / steps[step][1]
    return tokens / seconds if seconds else None


def write_documents(path: Path, longest: int = 2048) -> Path:
    """Write random letters, each a token of the byte tokenizer below.

    Documents of up to 2,048 tokens have guanaco's lengths. Longer ones are that many times as long, and fewer.
    """
    chance, times = random.Random(0), longest / 2048
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(int(3000 / max(1.0, times))):
            length = min(longest - 2, max(16, int(times * chance.lognormvariate(5.9, 0.8))))
            text = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=length))
            stream.write(json.dumps({"text": text}) + "\n")
    return path


def write_model(shape: str, folder: Path) -> Path:
    """Write a model of one of `SHAPES` with random weights and a tokenizer of single bytes."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _byte_tokenizer(config.vocab_size).save_pretrained(folder)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # this process goes on beside those that need the memory
    return folder


def _byte_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<extra_{index}>" for index in range(len(names), vocabulary)]
    tokenizer = Tokenizer(
        models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


if __name__ == "__main__":
    sys.exit(main())
