"""The report of the data: what people see before they train."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from job.data.page import page
from job.data.report import lines
from tests.conftest import LIGHTHOUSE, Job

EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(1)>\x1b[2J'


def report(**changes: Any) -> dict[str, Any]:
    part = {
        "format": "messages", "trained_on": "the assistant's part", "rows_read": 9, "rows": 6, "tokens": 60, "learned_tokens": 30, "longest_row": 40,
        "lengths": {"8": 5, "20": 1}, "original_lengths": {"8": 5, "40": 1}, "truncated_rows": 1, "split_rows": 0, "rows_dropped_for_length": 0,
        "unlearnable_rows": 1, "malformed_rows": 2, "rows_not_wanted": 0, "duplicates": 1, "bos_per_row": {"1": 6}, "eos_per_row": {"1": 6},
        "told": {EVIL: 2},
        "reasons": [{"reason": EVIL, "rows": 2, "first": [{"place": EVIL, "reason": EVIL, "preview": EVIL}]}],
        "samples": [[["Yes", 5, True], [EVIL, 6, False]]], "first_row": {"text": "", "learned": ""},
    }  # fmt: skip
    whole = {
        "chat_template": EVIL,
        "max_length": 20,
        "packed": False,
        "deduplicated": False,
        "overlap": 0,
        "train": part,
    }
    return whole | changes


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_runs_nothing_that_a_dataset_wrote() -> None:
    found = Tags()
    found.feed(page(report(), ["train"], EVIL))
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "default-src 'none'" in page(report(), ["train"], "x")
    assert "<script>alert(1)</script>" in found.text  # shown, not run
    assert "\x1b" not in found.text
    assert '<span class=on title="5">Yes</span>' in page(report(), ["train"], "x")


def test_the_terminal_says_what_was_cut_left_out_and_doubled() -> None:
    told = "\n".join(f"{level}: {text}" for level, text in lines(report(overlap=3), ["train"]))
    assert "info: train: 6 rows as messages, 60 tokens, 30 learned (50%)" in told
    assert "warning: 1 train rows are longer than 20 tokens and were cut." in told
    assert "warning: 1 train rows have prompts that fill 20 tokens, and were left out." in told
    assert "warning: 2 malformed train rows were left out." in told
    assert "FT_DEDUPLICATE=true removes them" in told
    assert "warning: 3 evaluation rows are also training rows" in told
    assert len(told.splitlines()) <= 10


@pytest.mark.parametrize("name", ["lighthouse.jsonl"])
def test_a_first_look_needs_no_weights_and_touches_no_run(job: Job, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(job.environment["FT_MODEL_NAME"]).iterdir():
        if not file.name.endswith(".safetensors"):
            (model / file.name).write_bytes(file.read_bytes())
    result = job.run("data", FT_MODEL_NAME=str(model), FT_PUBLISH_TO="hf://user/name", FT_STORE_URL="s3://nowhere/x")
    assert result.code == 0, result.stderr
    output = Path(job.environment["FT_OUTPUT_DIR"])
    html = output / "data" / "runs" / "data" / "prepare" / "data_report.html"
    assert str(html) in str(result.events[0]["message"])  # before anything is done
    text = html.read_text(encoding="utf-8")
    assert re.search(r"what is learned</td><td>the assistant&#x27;s part", text)
    assert text.count('<div class="sample"') >= 8
    assert sorted(path.name for path in output.iterdir()) == ["data"]
    assert job.run("data", FT_MODEL_NAME=str(model), FT_TRAIN_ON="all").code == 0  # with other settings, any time
    assert "everything" in html.read_text(encoding="utf-8")
    assert LIGHTHOUSE.name == name
