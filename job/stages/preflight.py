"""Stage preflight: settings, machine, sources, store, destination → no files, but the certainty of success."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.filesize import decimal

from job.checkpoints.manifest import marked
from job.cluster import is_in_container_layer
from job.environment.model_settings import refuse_unfit
from job.errors import InputError, NodeError
from job.hub.publish import destinations_of
from job.hub.sources import disk_needed, look_up, model_config
from job.model.device import compute_dtype, device_of, require_fp8
from job.model.exports import obstacle
from job.report.events import message
from job.run import Run, write_json
from job.stages import stages_of
from job.stages.download import recorded_commits, wanted_sources
from job.storage import scheme_of


def preflight(run: Run) -> None:
    """Raise now what would otherwise be raised after hours."""
    if _computes(run):
        _check_device(run)
    if marked(run.paths.stage_dir("download")) is None:  # else all of it is here, and nobody needs to be asked
        commits = recorded_commits(run)
        listings = {source: look_up(source, commits.get(source.variable)) for source, _ in wanted_sources(run)}
        for source, listing in listings.items():
            if source.kind == "model":  # what its weights are, before they are fetched
                config = model_config(replace(source, revision=listing.commit or source.revision))
                refuse_unfit(run.settings, config)
                if run.settings.export and (reason := obstacle(config, run.settings.export)) is not None:
                    raise InputError(f"FT_EXPORT: {reason}.", "Leave those formats out of FT_EXPORT.")
        _check_disk(run, disk_needed(listings))
    if "publish" in run.settings.stages:
        for destination in destinations_of(run):
            destination.check()


_COMPUTING = ("train", "sample", "merge", "export")


def _computes(run: Run) -> bool:
    """Whether a stage that is left computes with the model. A login node may fetch, prepare and publish without a GPU."""
    wanted: set[str] = set(run.settings.stages)
    needs = {stage.name: stage.needs for stage in stages_of(run.settings)}
    while more := {need for name in wanted for need in needs.get(name, ())} - wanted:
        wanted |= more
    left = [name for name in _COMPUTING if name in wanted and marked(run.paths.stage_dir(name)) is None]
    return bool(left) or "preflight" in run.settings.stages


def _check_device(run: Run) -> None:
    device = device_of(run.settings, run.node.local_rank)
    if device.type == "cpu":
        message(
            f"Computing on the CPU with {torch.get_num_threads()} threads in {compute_dtype(run.settings, device)}."
        )
        return
    try:
        _acceptance_test(device)
    except RuntimeError as error:
        raise NodeError(
            f"The GPU failed its acceptance test: {error}",
            "Use another machine: this one's driver or card is broken.",
        ) from error
    if run.settings.nproc_per_node != "auto" and run.settings.nproc_per_node > torch.cuda.device_count():
        raise NodeError(
            f"FT_NPROC_PER_NODE={run.settings.nproc_per_node}, but this machine has {torch.cuda.device_count()} GPUs.",
            "Unset it to use all of them.",
        )
    properties = torch.cuda.get_device_properties(device)
    count = torch.cuda.device_count()
    if run.settings.frozen_precision == "fp8":
        require_fp8(device)
    dtype = compute_dtype(run.settings, device)
    rate = _matmul_flops(device, dtype)
    write_json(run.paths.card_file, {"name": properties.name, "matmul_flops": rate})
    message(
        f"{count} × {properties.name}, {properties.total_memory / 2**30:.0f} GiB each, computing in {dtype}: "
        f"{rate / 1e12:.0f} TFLOP/s in large matrix products."
    )


def _acceptance_test(device: torch.device) -> None:
    """Compute one product whose result is known. A card with a broken unit or a half-installed driver fails here."""
    ones = torch.ones(1024, 1024, device=device)
    total = float((ones @ ones).double().sum())
    if total != 1024.0**3:
        raise RuntimeError(f"a matrix product gave {total} instead of {1024.0**3}")


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 8192³ products of random values over a second: what the card sustains, not what its data sheet says."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    out, products = a @ a, 0
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < 1:
        for _ in range(8):
            torch.mm(a, a, out=out)
        torch.cuda.synchronize(device)
        products += 8
    return products * 2 * 8192**3 / seconds


def _check_disk(run: Run, needed: int) -> None:
    run.paths.run_dir.mkdir(parents=True, exist_ok=True)
    store = run.store.url
    if scheme_of(store) in ("", "file") and is_in_container_layer(Path(store.removeprefix("file://"))):
        message(
            f"{store} is inside this container: checkpoints and results are lost with it. "
            "Mount a volume there, or set FT_STORE_URL to a bucket.",
            "warning",
        )
    free = shutil.disk_usage(run.paths.run_dir).free
    if free < needed:
        raise NodeError(
            f"FT_OUTPUT_DIR={run.settings.output_dir} has {decimal(free)} free, the run needs {decimal(needed)}.",
            "Set FT_OUTPUT_DIR to a larger volume, or free space there.",
        )
