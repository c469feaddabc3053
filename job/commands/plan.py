"""Shows what a run would do, without doing any of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from job.commands.card_table import PREDICTED, compare, lacks, wanted_cards
from job.environment.local_files import SOURCES, source_names
from job.errors import JobError
from job.gpus import Gpu, cuda_build, driver_problem, visible_gpus
from job.hub.publish import destinations_of
from job.hub.sources import Listing, Source, disk_needed, kind_of, look_up, model_config
from job.run import Run, read_json
from job.settings import Settings, variable
from job.stages import stages_of
from job.training.plan.candidates import Plan, plans
from job.training.plan.cards import GIB, Card, card_named
from job.training.plan.choose import choose, fits
from job.training.plan.load import Load, Shape, load_of, obstacle


def print_plan(run: Run) -> None:
    """Print sources and sizes, stages, steps, disk and the plans for the GPU.

    Nothing is written below FT_OUTPUT_DIR. Only the config.json of a Hub model is fetched. After the table, raises the
    first error that a run would meet at its sources.
    """
    settings = run.settings
    wanted_cards(settings, any_here=True)  # a wrong name is told before anybody is asked for sizes
    lines = [("run", run.id), ("store", run.store.url)]
    if run.node.count > 1:
        lines.append(("node", f"{run.node.index} of {run.node.count}; they meet in the store"))
    listings: dict[Source, Listing] = {}
    failures: list[JobError] = []
    for name in SOURCES:
        for text in source_names(name, getattr(settings, name)):
            source = Source.parse(f"FT_{name.upper()}", kind_of(name), text)
            lines.append((name.removesuffix("_name").replace("_", " "), _describe(source, listings, failures)))
    gpus = visible_gpus()
    devices = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus) or "no GPU here"
    lines.append(("device", f"cpu × {run.processes_per_node}" if settings.device == "cpu" else f"cuda: {devices}"))
    lines += [
        ("stages", " → ".join(stage.name for stage in stages_of(settings) if stage.name in settings.stages)),
        ("steps", _steps(run)),
        ("disk needed", decimal(disk_needed(listings))),
    ]
    lines.append(
        ("publishes to", ", ".join(map(str, destinations_of(run))) if "publish" in settings.stages else "nothing")
    )
    if settings.device == "cuda" and (problem := driver_problem(cuda_build())) is not None:
        lines.append(("driver", f"too old: {problem}"))
    for label, text in lines:
        print(f"{label:<14}{text}")
    for line in _computation(run):
        print(line)
    if failures:
        raise failures[0]


def _computation(run: Run) -> list[str]:
    """How a batch would be computed on this machine's GPU or on those of FT_PLAN_GPU, and which other plans there are."""
    settings = run.settings
    if settings.plan_gpu is None and settings.device == "cpu":
        return []
    here = visible_gpus()
    wanted = wanted_cards(settings, any_here=bool(here))
    card = _card_here(here) if wanted is None else wanted[0][1]
    if card is None:
        return [f"\nNo plan: the planner does not know the {here[0].name}. The job goes by its free memory."]
    several = wanted is not None and (len(wanted) > 1 or wanted[0][0] > 1)
    for_what = "" if several else f" for {card.name}"
    try:
        config = _config(run)
        load, known = _load(run)
        reason = obstacle(settings, config, load.longest_row) or (None if several else lacks(card, settings))
        shape = Shape.of(config, settings) if reason is None else None
    except (JobError, OSError, ValueError) as error:
        return [f"\nNo plan{for_what}: the model's config.json cannot be read: {getattr(error, 'message', error)}"]
    if shape is None:
        slower = "transformers and peft would train it: slower, and without a prediction of memory."
        if card.too_old and not several:
            return [f"\n{card.name}: {reason}."]
        return [f"\nNo plan{for_what}: only the job's fused layers are planned, and {reason}. {slower}"]
    if several and wanted is not None:
        return compare(wanted, shape, load, settings, tokens=_tokens(run, load) if known else None)
    return _plans_for(card, shape, load, known, settings)


def _plans_for(card: Card, shape: Shape, load: Load, known: bool, settings: Settings) -> list[str]:
    """The plans for one card that are worth showing."""
    limit = math.inf if settings.gpu_memory_gib is None else settings.gpu_memory_gib * GIB
    free = min(card.free_bytes, limit)
    candidates = list(plans(shape, load, card, settings))
    chosen = choose(candidates, free)
    what = (
        f"a batch of {load.mean_batch:,.0f} tokens"
        if known
        else f"a batch of {load.mean_batch:,.0f} tokens, the most possible,"
    )
    lines = [f"\n{card.name}, {min(card.memory_bytes, limit) / GIB:.0f} GiB: how {what} would be computed"]
    lines.append(f"  {'weights':<10}{'recomputed':>12}{'tokens at once':>16}{'memory':>11}{'tokens/s per GPU':>18}")
    for plan in _worth_showing(candidates, chosen, free):
        mark = "→" if plan == chosen and fits(plan, free) else " "
        at_once = max(plan.micro_batch_tokens, min(load.longest_row, load.largest_batch))
        rate = f"{load.mean_batch / plan.seconds:.3g}"
        lines.append(
            f"{mark} {plan.weights:<10}{f'{plan.recomputed} of {shape.layers}':>12}{at_once:>16,}"
            f"{plan.memory_bytes / GIB:>7.1f} GiB{float(rate):>18,.0f}{'' if fits(plan, free) else '  does not fit'}"
        )
    return [*lines, *_legend(settings, fits(chosen, free), known)]


def _tokens(run: Run, load: Load) -> float:
    """The tokens of the training as prepared: of each card with FT_MAX_STEPS, of all together without."""
    settings, train = run.settings, read_json(run.paths.data_report_file)["train"]
    if settings.max_steps is not None:
        return settings.max_steps * settings.gradient_accumulation_steps * load.mean_batch
    rows = int(train.get("packed_rows", train["rows"]))
    return rows / settings.per_device_train_batch_size * load.mean_batch * settings.num_train_epochs


def _legend(settings: Settings, found: bool, known: bool) -> list[str]:
    if found:
        lines = ["The arrow marks the fastest plan that fits."]
    else:
        names = (
            "resident_weights",
            "gradient_checkpointing",
            "recomputed_layers",
            "micro_batch_tokens",
            "gpu_memory_gib",
        )
        chosen = [variable(name) for name in names if getattr(settings, name) not in ("auto", None)]
        lines = [
            f"None of them fits: unset {', '.join(chosen)}."
            if chosen
            else "None of them fits: rent a larger card, or lower FT_MAX_SEQ_LENGTH."
        ]
    lines.append("resident: 4-bit weights dequantized to 16 bits. recomputed: layers with gradient checkpointing.")
    lines.append(PREDICTED)
    if not known:
        lines.append(
            "Shorter rows mean fewer tokens per batch, which is slower. Once the data is prepared, "
            "this table uses its lengths: FT_STAGES=prepare FT_DEVICE=cpu python entrypoint.py"
        )
    return lines


def _worth_showing(candidates: list[Plan], chosen: Plan, free: float) -> list[Plan]:
    """The chosen plan and, for each form of the weights, the fastest that fits, the fastest of all and the smallest."""
    shown = {chosen}
    for weights in {plan.weights for plan in candidates}:
        own = [plan for plan in candidates if plan.weights == weights]
        shown |= {choose(own, free), choose(own, math.inf), min(own, key=lambda plan: plan.memory_bytes)}
    return sorted(shown, key=lambda plan: (plan.seconds, plan.memory_bytes, plan.weights))


def _card_here(gpus: Sequence[Gpu]) -> Card | None:
    found = card_named(gpus[0].name)
    return (
        replace(found, memory_bytes=gpus[0].memory_bytes) if found is not None else None
    )  # it may be a slice of a card


def _config(run: Run) -> dict[str, Any]:
    downloaded = run.paths.model_dir / "config.json"
    if downloaded.is_file():
        return dict(read_json(downloaded))
    return model_config(Source.parse("FT_MODEL_NAME", "model", run.settings.model_name))


def _load(run: Run) -> tuple[Load, bool]:
    if run.paths.data_report_file.is_file():
        return load_of(read_json(run.paths.data_report_file), run.settings), True
    longest = 1024 if run.settings.max_seq_length == "auto" else run.settings.max_seq_length
    return Load.of({longest: 1}, run.settings.per_device_train_batch_size, 1, longest), False


def _describe(source: Source, listings: dict[Source, Listing], failures: list[JobError]) -> str:
    try:
        listing = look_up(source)
    except JobError as error:
        failures.append(error)
        return f"{source}: {error.message}"
    listings[source] = listing
    commit = f" at {listing.commit[:12]}" if listing.commit else ""
    return f"{source}{commit}, {decimal(listing.total_bytes)} in {len(listing.files)} files"


def _steps(run: Run) -> str:
    settings = run.settings
    if settings.max_steps is not None:
        return f"{settings.max_steps:,}"
    rows = _rows(run)
    if rows is None:
        return "known once the data is prepared"
    per_step = (
        settings.per_device_train_batch_size
        * run.processes_per_node
        * run.node.count
        * settings.gradient_accumulation_steps
    )
    return f"{math.ceil(math.ceil(rows / per_step) * settings.num_train_epochs):,} ({rows:,} rows, {per_step} per step, {settings.num_train_epochs:g} epochs)"


def _rows(run: Run) -> int | None:
    """The number of training rows, once they are prepared or if they are all lines of a local JSONL file; None if unknown."""
    if run.paths.data_report_file.is_file():
        report = read_json(run.paths.data_report_file)["train"]
        return int(report.get("packed_rows", report["rows"]))
    settings = run.settings
    path = Path(settings.dataset_name).expanduser()
    chosen = settings.dataset_split != "train" or settings.dataset_sample is not None or settings.deduplicate
    if chosen or settings.packing or settings.eval_split or path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
