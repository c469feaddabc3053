"""The README is accurate: its settings, files, commands and links."""

from __future__ import annotations

import re

from job.environment import settings_table
from job.errors import ExitCode
from job.stages import STAGES
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_table_matches_the_code() -> None:
    begin, end = "<!-- settings: begin -->", "<!-- settings: end -->"
    rows = README[README.index(begin) : README.index(end)].strip().splitlines()[3:]
    expected = ["| `{name}` | {allowed} | `{default}` | {meaning} |".format(**row) for row in settings_table()]
    assert rows == expected


def test_every_file_of_the_tree_exists_and_every_module_is_in_it() -> None:
    tree = README[README.index("## The files") : README.index("## How to add")]
    named = set(re.findall(r"^  (\S+\.py)", tree, re.MULTILINE))
    there = {path.relative_to(ROOT / "job").as_posix() for path in (ROOT / "job").rglob("*.py")}
    listed_as_rooms = {name for name in there if name.startswith("stages/")}
    empty_rooms = {name for name in there if name.endswith("__init__.py") and name not in named}
    assert named == there - listed_as_rooms - empty_rooms
    for name in re.findall(r"^([a-z0-9]+/\S+|entrypoint\.py)", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_every_stage_and_every_exit_code_is_explained() -> None:
    for stage in STAGES:
        assert f"| {stage.name} |" in README
    for code in ExitCode:
        assert f"| {int(code)} |" in README


def test_every_relative_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_every_named_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
