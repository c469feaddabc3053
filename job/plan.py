"""What a run would do, told without doing any of it."""

from __future__ import annotations

import math
from pathlib import Path

from rich.filesize import decimal

from job.cluster import visible_gpus
from job.errors import JobError
from job.hub.publish import Destination
from job.hub.sources import Listing, Source, disk_needed, look_up
from job.run import Run, read_json
from job.stage import training_processes


def print_plan(run: Run) -> None:
    """Print sources and sizes, stages, steps and disk; nothing is written and nothing is downloaded."""
    settings = run.settings
    lines = [("run", run.id), ("store", run.store.url)]
    if run.node.count > 1:
        lines.append(("node", f"{run.node.index} of {run.node.count}; they meet in the store"))
    listings: dict[Source, Listing] = {}
    for name in ("model_name", "dataset_name", "eval_dataset_name"):
        text = getattr(settings, name)
        if text is not None:
            source = Source.parse(f"FT_{name.upper()}", "model" if name == "model_name" else "dataset", text)
            lines.append((name.removesuffix("_name").replace("_", " "), _describe(source, listings)))
    gpus = visible_gpus()
    devices = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in gpus) or "no GPU here"
    lines.append(
        ("device", f"cpu × {training_processes(settings)}" if settings.device == "cpu" else f"cuda: {devices}")
    )
    lines += [
        ("stages", " → ".join(settings.stages)),
        ("steps", _steps(run)),
        ("disk needed", decimal(disk_needed(listings))),
    ]
    lines.append(("publishes to", str(Destination.of(run)) if "publish" in settings.stages else "nothing"))
    for label, text in lines:
        print(f"{label:<14}{text}")


def _describe(source: Source, listings: dict[Source, Listing]) -> str:
    try:
        listing = look_up(source)
    except JobError as error:
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
        * training_processes(settings)
        * run.node.count
        * settings.gradient_accumulation_steps
    )
    return f"{math.ceil(math.ceil(rows / per_step) * settings.num_train_epochs):,} ({rows:,} rows, {per_step} a step, {settings.num_train_epochs:g} epochs)"


def _rows(run: Run) -> int | None:
    """Training rows: exactly if they are prepared, by counting lines of a local JSONL file, else unknown."""
    if run.paths.data_report_file.is_file():
        report = read_json(run.paths.data_report_file)["train"]
        return int(report.get("packed_rows", report["rows"]))
    path = Path(run.settings.dataset_name).expanduser()
    if run.settings.packing or run.settings.eval_split or path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as stream:
        return sum(1 for line in stream if line.strip())
