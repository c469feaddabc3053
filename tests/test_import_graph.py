"""Imports between packages run in one direction."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A module may import from its own package, and from packages further down.
LEVELS = (
    {"entrypoint"},
    {"job.commands"},
    {"job.supervision"},
    {"job.stages"},
    {"job.training", "job.nodes", "job.hub"},
    {"job.model", "job.data", "job.checkpoints", "job.report"},
    {"job.run"},
    {"job.environment"},
    {"job.storage"},
    {"job.settings", "job.paths", "job.cluster", "job.gpus", "job.guard", "job.durability", "job.leave"},
    {"job.errors", "job"},
)
HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "tokenizers", "safetensors", "accelerate"}
MAY_BE_HEAVY = ("job.data", "job.model", "job.training", "job.stages")


def modules() -> dict[str, Path]:
    files = [ROOT / "entrypoint.py", *(ROOT / "job").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, including imports inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "job" else {str(node.module)}
            )
    return names


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2])


def level(module: str) -> int:
    found = [index for index, rooms in enumerate(LEVELS) if room(module) in rooms]
    assert found, f"{module} has no place in LEVELS: give it one"
    return found[0]


def violations(module: str, imported: set[str]) -> list[str]:
    ours = {name for name in imported if name.split(".")[0] in ("job", "entrypoint")}
    wrong = [
        name
        for name in ours
        if room(name) != room(module) and name != "job.__version__" and level(name) <= level(module)
    ]
    return [f"{module} → {name}" for name in wrong]


def test_imports_run_one_way() -> None:
    found = [line for module, path in modules().items() for line in violations(module, imports(path))]
    assert found == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("job.storage.s3", "job.run"),
        ("job.model.merge", "job.stages.merge"),
        ("job.run", "job.supervision.supervisor"),
        ("job.data.formats", "job.hub.sources"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(module: str, imported: str) -> None:
    assert violations(module, {imported}) == [f"{module} → {imported}"]


def test_only_data_model_training_and_stages_import_the_heavy_libraries() -> None:
    heavy = {module: imports(path) for module, path in modules().items() if not module.startswith(MAY_BE_HEAVY)}
    found = {
        module: sorted(names)
        for module, imported in heavy.items()
        if (names := {name.split(".")[0] for name in imported} & HEAVY)
    }
    assert found == {}


def test_no_package_is_called_utils() -> None:
    assert not [name for name in modules() if name.rsplit(".", 1)[-1] in ("utils", "helpers", "common", "manager")]
