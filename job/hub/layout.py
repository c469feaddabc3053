"""What is published: the repository as others will see it, laid out in a folder of this run."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

from job import __version__, durability
from job.environment import as_json
from job.environment.local_files import public_name
from job.environment.mixture import dataset_parts
from job.hub.ownership import RECORD
from job.report.model_card import Published, write_model_card
from job.report.plots import draw_loss_curve
from job.run import Run, read_json, write_json

CURVE = "loss_curve.png"
# What is published of a folder: no more than the job puts there, whoever else may write to the store. `*` matches no `/`.
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODEL_FILES = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_EXPORTS = ("*.gguf", "Modelfile", *(f"fp8/{name}" for name in _MODEL_FILES))
_TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # of the base, which hold for what was made of it
_REPORTS = ("sample/samples.json", "merge/merge_proof.json", "prepare/data_report.html")


def lay_out(run: Run, published: Published) -> Path:
    """The repository: the merged model with the adapter in a subfolder, or one of them, and what was found out on the way.

    Without a merged model the adapter lies at the top, where peft looks for it, and the tokenizer is still to be added.
    """
    paths, repository = run.paths, run.paths.repository_dir
    shutil.rmtree(repository, ignore_errors=True)
    repository.mkdir(parents=True)
    if published.merged:
        _link_tree(paths.merged_dir, repository, _MODEL_FILES)
        if paths.exports_dir.is_dir():
            _link_tree(paths.exports_dir, repository, _EXPORTS)
    if published.adapter:
        folder = repository / "adapter" if published.merged else repository
        _link_tree(paths.adapter_dir, folder, _ADAPTER_FILES)
        for name in _ADAPTER_FILES:
            (folder / name).chmod(0o644)  # safetensors writes files that only the owner can read
    for pattern in _TERMS:
        for file in paths.model_dir.glob(pattern):
            shutil.copy(file, repository / file.name)
    for name in _REPORTS:
        if (paths.run_dir / name).is_file() and (published.merged or "merge" not in name):
            shutil.copy(paths.run_dir / name, repository / Path(name).name)
    if history := read_json(paths.trainer_state_file)["log_history"]:
        draw_loss_curve(history, run.settings.new_model_name.rsplit("/", 1)[-1], repository / CURVE)
    (repository / "README.md").write_text(write_model_card(run, published, curve_file=CURVE), encoding="utf-8")
    write_json(repository / RECORD, _record(run))
    return repository


def _record(run: Run) -> dict[str, object]:
    """The run in machine-readable form: settings and metrics, without the paths and places of this machine."""
    private = {
        name for name in as_json(run.settings)
        if name.startswith("s3_") or name.endswith(("_dir", "_url", "_file", "_addr", "_address", "_log", "_port")) or name in ("publish_to", "container", "device_map")
    }  # fmt: skip
    settings = {name: value for name, value in as_json(run.settings).items() if name not in private}
    for name in ("model_name", "eval_dataset_name", "adapter_name", "chat_template"):
        settings[name] = public_name(settings[name]) if settings[name] else settings[name]
    settings["dataset_name"] = ", ".join(public_name(part.name) for part in dataset_parts(run.settings))
    metrics = {
        name: value
        for name, value in read_json(run.paths.metrics_file).items()
        if not name.startswith(("seconds", "goodput", "plan"))  # how it was computed differs from start to start
    }
    return {"job_version": __version__, "run_id": run.id, "settings": settings, "metrics": metrics}


def _link_tree(source: Path, target: Path, wanted: tuple[str, ...]) -> None:
    for path in source.rglob("*"):
        place = path.relative_to(source)
        if path.is_file() and any(_matches(place, pattern) for pattern in wanted):
            copy = target / place
            copy.parent.mkdir(parents=True, exist_ok=True)
            durability.link(path.resolve(), copy)


def _matches(place: Path, pattern: str) -> bool:
    parts = pattern.split("/")
    return len(parts) == len(place.parts) and all(map(fnmatch.fnmatchcase, place.parts, parts))
