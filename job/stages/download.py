"""Stage download: FT_MODEL_NAME, FT_DATASET_NAME, FT_EVAL_DATASET_NAME → download/{model,dataset,eval_dataset}, sources.json."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from rich.filesize import decimal

from job.data.check import check_rows
from job.environment.adapter_settings import with_adapters_own
from job.environment.mixture import named_parts
from job.guard import model_files
from job.guard.limits import limit_files
from job.hub.sources import Source, fetch, listed_sha256, look_up
from job.paths import WITHOUT_WEIGHTS
from job.report.events import message, progress
from job.run import Run, write_json
from job.stages.turn import await_turn


def wanted_sources(run: Run) -> list[tuple[Source, Path]]:
    """The run's sources and the folder of each. Small ones come first, so that a mistake in the data costs little."""
    settings, paths = run.settings, run.paths
    sources = [
        (Source.parse(variable, "dataset", part.name), folder)
        for variable, part, folder in named_parts(settings, paths.dataset_dir)
    ]
    if settings.eval_dataset_name is not None:
        sources.append(
            (Source.parse("FT_EVAL_DATASET_NAME", "dataset", settings.eval_dataset_name), paths.eval_dataset_dir)
        )
    if settings.adapter_name is not None:
        adapter = Source.parse("FT_ADAPTER_NAME", "adapter", settings.adapter_name)
        sources.append((adapter, paths.stage_dir("download") / "adapter"))
    model = Source.parse("FT_MODEL_NAME", "model", settings.model_name)
    return [*sources, (replace(model, weights=os.environ.get(WITHOUT_WEIGHTS) != "1"), paths.model_dir)]


def recorded_commits(run: Run) -> dict[str, str]:
    """The commits that the first start of this run resolved. A branch may have moved since."""
    try:
        record = json.loads(run.store.get(f"{run.id}/run.json"))
    except FileNotFoundError:
        return {}
    return dict(record.get("commits", {}))


def download(run: Run) -> None:
    """Fetch what is not here yet, at the commits that the run started with."""
    await_turn(run, "download")
    run.paths.run_dir.mkdir(parents=True, exist_ok=True)
    limit_files(shutil.disk_usage(run.paths.run_dir).free)
    commits, report = recorded_commits(run), {}
    sources = wanted_sources(run)
    listings = [look_up(source, commits.get(source.variable)) for source, _ in sources]
    total, done = sum(listing.total_bytes for listing in listings), 0
    for (source, folder), listing in zip(sources, listings, strict=True):
        run.check_stop()
        message(
            f"{source.described}: {decimal(listing.total_bytes)}" + (f" at {listing.commit}" if listing.commit else "")
        )
        fetch(source, listing, folder)
        if source.kind == "model":
            model_files.check(folder)
        elif source.kind == "adapter":
            config = model_files.read(run.paths.earlier_adapter_dir / "adapter_config.json")
            with_adapters_own(run.settings, config)
        else:
            check_rows(run.settings, folder, run.paths.dataset_dir, run.paths.eval_dataset_dir)
        done += listing.total_bytes
        progress(done / 1e6, total / 1e6, "MB")
        report[source.variable] = {
            "source": source.place,
            "kind": source.scheme,
            "folder": folder.relative_to(run.paths.stage_dir("download")).as_posix(),
            "revision": source.revision,
            "commit": listing.commit,
            "bytes": listing.total_bytes,
            "card": dict(listing.card),
            "sha256": listed_sha256(listing, folder) if source.scheme == "hub" else {},
        }
    write_json(run.paths.sources_file, report)
