"""Names from outside never lead out of the folder that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.data.splits import find_splits
from job.errors import InputError, SettingsError
from job.guard.escape import for_cell, for_line, for_terminal, json_line
from job.guard.names import UnsafeName, below, refuse_conflicts
from job.hub import sources
from job.hub.sources import Listing, Source, fetch, look_up
from job.report.events import parse

MANY = settings(max_examples=10_000, deadline=None)
pieces = st.sampled_from(
    ["..", ".", "", "a", "b.jsonl", "~", "C:", "con", " ", "\\", "\x00", "é", "\ud800", "/", "//", "%2e%2e", "…"]
)
names = st.one_of(
    st.text(max_size=40), st.lists(pieces, max_size=6).map("/".join), st.lists(pieces, max_size=6).map("".join)
)


@MANY
@given(names)
@example("data//tmp/x")
@example("data/../../F.json")
@example("/etc/passwd")
@example("~root/x")
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    root = Path("/srv/run/download")
    try:
        path = below(root, name)
    except UnsafeName:
        return
    resolved = Path(*path.parts).resolve(strict=False) if ".." in path.parts else path
    assert root in resolved.parents and ".." not in path.parts
    assert path.relative_to(root).as_posix() == name


@pytest.mark.parametrize("both", [["a.jsonl", "a.jsonl/b.jsonl"], ["a", "a"], ["x/y/z", "x/y"]])
def test_a_name_that_is_a_file_and_a_folder_is_refused(both: list[str]) -> None:
    with pytest.raises(UnsafeName):
        refuse_conflicts(both)


class Bucket:
    """A store with any keys that somebody chose."""

    def __init__(self, keys: list[str]) -> None:
        self._keys, self.written = keys, []

    def entries(self, _prefix: str) -> Any:
        return ((key, 3, "etag") for key in self._keys)

    def download(self, _key: str, target: Path) -> None:
        self.written.append(target)


@pytest.mark.parametrize(
    "keys",
    [
        ["data//tmp/x/F.json"],
        ["data/../../F.json"],
        ["../F.json"],
        ["a.jsonl", "a.jsonl/b.jsonl"],
        ["x\x1b[2J.json"],
        ["C:\\F.json"],
    ],
)
def test_an_s3_source_with_such_keys_is_refused_with_65_and_nothing_is_written(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(keys)
    monkeypatch.setattr(sources, "open_store", lambda url: bucket)
    source = Source.parse("FT_DATASET_NAME", "dataset", "s3://bucket/prefix")
    with pytest.raises(InputError, match="FT_DATASET_NAME"):
        look_up(source)
    with pytest.raises(UnsafeName):  # nor would fetching write it, if it were listed
        fetch(source, Listing(None, ((keys[0] if len(keys) == 1 else "../x", 3),)), tmp_path)
    assert all(tmp_path in path.parents for path in bucket.written)


def test_a_hub_file_with_brackets_in_its_name_is_fetched_as_what_it_is_called(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fnmatch
    import glob

    assert fnmatch.fnmatch("train[1].jsonl", glob.escape("train[1].jsonl"))
    assert not fnmatch.fnmatch("train1.jsonl", glob.escape("train[1].jsonl"))


@pytest.mark.parametrize("text", ["a/..", "../b/c", "a/b..c", ".hidden/x"])
def test_a_hub_id_with_dots_is_a_wrong_setting(text: str) -> None:
    with pytest.raises(SettingsError):
        Source.parse("FT_MODEL_NAME", "model", text)


# -- what a dataset's card may name ---------------------------------------------------------------------------------


def dataset(folder: Path, data_files: Any, **more: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"text": "mine"}\n', encoding="utf-8")
    (folder / "more.jsonl").write_text('{"text": "mine too"}\n', encoding="utf-8")
    card = {"configs": [{"config_name": "default", "data_files": data_files, **more}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# card\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret.jsonl", "a/../../secret.jsonl", "../*", "hf://datasets/other/private/x.jsonl", "http://127.0.0.1/x.jsonl",
     "webhdfs://h/x", "s3://b/x", "file:///etc/passwd", "~/.docker/config.json", "zip://x::/etc/passwd", "/**"],
)  # fmt: skip
def test_a_card_that_names_files_elsewhere_is_refused_with_65(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n', encoding="utf-8")
    folder = dataset(tmp_path / "set", [{"split": "train", "path": path}])
    with pytest.raises(InputError):
        find_splits(folder, None)


@pytest.mark.parametrize("data_dir", ["/etc", "..", "a/../..", "hf://datasets/x"])
def test_a_cards_data_dir_stays_in_the_dataset(tmp_path: Path, data_dir: str) -> None:
    folder = dataset(tmp_path / "set", [{"split": "train", "path": "*"}], data_dir=data_dir)
    with pytest.raises(InputError):
        find_splits(folder, None)


def test_a_cards_own_files_and_configurations_are_read_as_the_hub_reads_them(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", [{"split": "train", "path": "rows*"}, {"split": "test", "path": ["more.jsonl"]}])
    assert {name: [file.name for file in files] for name, files in find_splits(folder, None).items()} == {
        "train": ["rows.jsonl"], "test": ["more.jsonl"],
    }  # fmt: skip
    with pytest.raises(InputError, match="no configuration 'other'"):
        find_splits(folder, "other")


def test_a_card_with_aliases_does_not_grow(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "set", "rows.jsonl")
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    (folder / "README.md").write_text(f"---\n{bomb}---\n", encoding="utf-8")
    with pytest.raises(InputError, match="aliases"):
        find_splits(folder, None)


yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | names, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["split", "path", "config_name", "data_files", "data_dir", "default"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(yaml_values)
def test_no_card_makes_a_file_outside_be_opened(value: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "set"
        folder.mkdir()
        (folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")
        (Path(scratch) / "outside.jsonl").write_text("{}\n", encoding="utf-8")
        try:
            card = yaml.safe_dump({"configs": value if isinstance(value, list) else [value]}, allow_unicode=True)
            (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
        except (UnicodeEncodeError, yaml.YAMLError):
            return
        try:
            found = find_splits(folder, None)
        except InputError:
            return
        assert all(folder in path.parents for files in found.values() for path in files)


# -- text that becomes a log line, an event, a cell -----------------------------------------------------------------


@MANY
@given(st.text(max_size=200))
@example('\x1e{"event": "run_ended"}\n')
@example("a\r\nb\u2028c\x9b31m")
def test_no_text_makes_a_second_line_or_moves_the_cursor(text: str) -> None:
    line = json_line({"message": text})
    assert len(line.splitlines()) == 1 and json.loads(line)["message"] == text
    for shown in (line, for_line(text), for_terminal(text), for_cell(text)):
        assert not any(
            (ord(character) < 32 and character not in "\n\t") or 127 <= ord(character) < 160 for character in shown
        )
    assert "\n" not in for_line(text) and "\n" not in for_cell(text)
    assert "|" not in for_cell(text).replace("\\|", "")


@MANY
@given(st.binary(max_size=200))
def test_no_bytes_on_the_events_socket_raise(data: bytes) -> None:
    event = parse(data)
    assert event is None or isinstance(event["event"], str)
