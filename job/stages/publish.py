"""Stage publish: merge/model, train/adapter, every report → a Hub repository or a folder, publish/published.json."""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

from job import __version__
from job.environment import as_json
from job.hub.publish import RECORD, Destination, publish_folder, publish_to_hub
from job.hub.sources import public_name
from job.report.events import message, output
from job.report.model_card import write_model_card
from job.report.plots import draw_loss_curve
from job.run import Run, now, read_json, write_json

_CURVE = "loss_curve.png"
# What is published of a folder: no more than the job puts there, whoever else may write to the store.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODEL_FILES = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def publish(run: Run) -> None:
    """Lay out the repository, put it where FT_PUBLISH_TO says, and record where that is."""
    destination = Destination.of(run)
    repository = _lay_out(run, destination.hub_id or run.settings.new_model_name.rsplit("/", 1)[-1])
    run.check_stop()
    record = {"published": now(), "destination": str(destination)}
    if destination.hub_id is not None:
        name, commit = publish_to_hub(run, repository, destination.hub_id)
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        record |= {"repository": name, "commit": commit, "page": f"{endpoint}/{name}"}
    else:
        assert destination.folder is not None
        publish_folder(repository, destination.folder)
    write_json(run.paths.published_file, record)
    shutil.rmtree(repository, ignore_errors=True)
    where = record.get("page", record["destination"])
    message(f"Published to {where}.")
    output("published", where)
    if destination.folder is not None:
        output("loss curve", str(destination.folder / _CURVE))


def _lay_out(run: Run, published_name: str) -> Path:
    """The repository as others will see it: merged model, adapter in a subfolder, card, curve, samples, merge proof."""
    paths, repository = run.paths, run.paths.repository_dir
    shutil.rmtree(repository, ignore_errors=True)
    _link_tree(paths.merged_dir, repository, _MODEL_FILES)
    _link_tree(paths.adapter_dir, repository / "adapter", _ADAPTER_FILES)
    for file in (paths.samples_file, paths.merge_proof_file):
        shutil.copy(file, repository / file.name)
    history = read_json(paths.trainer_state_file)["log_history"]
    draw_loss_curve(history, run.settings.new_model_name.rsplit("/", 1)[-1], repository / _CURVE)
    (repository / "README.md").write_text(
        write_model_card(run, curve_file=_CURVE, published_name=published_name), encoding="utf-8"
    )
    write_json(repository / RECORD, _record(run))
    return repository


def _record(run: Run) -> dict[str, object]:
    """The run in machine-readable form: settings and metrics, without the paths and places of this machine."""
    private = {"output_dir", "store_url", "publish_to"}
    settings = {name: value for name, value in as_json(run.settings).items() if name not in private}
    for name in ("model_name", "dataset_name", "eval_dataset_name", "chat_template"):
        settings[name] = public_name(settings[name]) if settings[name] else settings[name]
    metrics = {
        name: value
        for name, value in read_json(run.paths.metrics_file).items()
        if not name.startswith(("seconds", "goodput", "plan"))  # how it was computed differs from start to start
    }
    return {"job_version": __version__, "run_id": run.id, "settings": settings, "metrics": metrics}


def _link_tree(source: Path, target: Path, wanted: tuple[str, ...]) -> None:
    """Use hard links where the file system has them, since a second copy of 13 GB would take the space twice."""
    for path in source.rglob("*"):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in wanted):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copy(path, copy)
