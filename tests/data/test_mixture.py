"""Several datasets are mixed by their weights, each with its own configuration, split and form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from job.environment.mixture import Part, parts_of
from tests.conftest import Job


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("user/name", [("user/name", None, "train", 1)]),
        ("user/name@v1", [("user/name@v1", None, "train", 1)]),
        ("a/b*0.5, c/d@main:sft:train[:10%]*2", [("a/b", None, "train", 0.5), ("c/d@main", "sft", "train[:10%]", 2)]),
        ("a/b::test", [("a/b", None, "test", 1)]),
        ("a/b:x:train[:5]+test[5:],c/d", [("a/b", "x", "train[:5]+test[5:]", 1), ("c/d", None, "train", 1)]),
        ("s3://bucket/a,s3://bucket/b*3", [("s3://bucket/a", None, "train", 1), ("s3://bucket/b", None, "train", 3)]),
        ('[{"name": "a/b", "split": null, "config": null}]', [("a/b", None, "train", 1)]),
        ('[{"name": "a/b", "split": "x", "weight": 2}, "c/d"]', [("a/b", None, "x", 2), ("c/d", None, "train", 1)]),
    ],
)  # fmt: skip
def test_a_mixture_is_written_as_a_list(text: str, parts: list[tuple[str, str | None, str, float]]) -> None:
    assert parts_of(text) == [Part(*part) for part in parts]


@pytest.mark.parametrize(
    "text",
    [
        "a/b*0", "a/b*x", "[]", '[{"split": "train"}]', '[{"name": "a/b", "wieght": 1}]', "[3]", "a/b:c:d:e", ",", '[""]',
        '[{"name": ""}]', '[{"name": "a/b", "split": 5}]', '[{"name": "a/b", "config": []}]', '[{"name": "a/b", "split": "train[:5"}]',
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_meant_is_refused(job: Job, text: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"weight|empty list|wrong|text or an object|not of the form|names no|is a text|part of a split",
    ):
        parts_of(text)
    result = job.run("plan", FT_DATASET_NAME=text)
    assert result.code == 78
    assert "FT_DATASET_NAME" in result.error["message"]


def test_two_files_of_other_forms_are_trained_on_together(job: Job, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(10)), encoding="utf-8"
    )
    rows = [{"text": f"Document {number}."} for number in range(20)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    name = f"{tmp_path}/pairs.csv*2, {tmp_path}/texts.jsonl::train[:10]*0.5"
    settings = {
        "FT_DATASET_NAME": name,
        "FT_DATASET_SPLIT": "train",
        "FT_EVAL_SPLIT": "",
        "FT_MAX_STEPS": "1",
        "FT_NEW_MODEL": "auto",
    }
    result = job.run(**settings)
    assert result.code == 0, result.stderr
    run = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"
    found = json.loads((run / "prepare" / "data_report.json").read_text(encoding="utf-8"))["train"]
    assert (found["rows"], found["format"], found["duplicates"]) == (25, "question_answer, text", 10)
    assert found["trained_on"] == "the assistant's part, everything"
    published = next(Path(job.environment["FT_OUTPUT_DIR"], "published").iterdir())
    assert published.name == "model-mixture"
    card = (published / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned on `pairs.csv` and `texts.jsonl`" in card
    assert str(tmp_path) not in card
    again = job.run(**settings)
    assert set(again.ended.values()) == {"skipped"}
    missing = job.run(FT_DATASET_NAME=f"{tmp_path}/pairs.csv,{tmp_path}/gone.jsonl", FT_RUN_ID="other")
    assert missing.code == 78
    assert "gone.jsonl" in missing.error["message"]


def test_copies_of_a_row_that_is_evaluated_on_are_not_trained_on(job: Job, tmp_path: Path) -> None:
    for name, count in (("many", 20), ("few", 10)):
        rows = [{"question": f"{name} {number}?", "answer": "Yes."} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = job.run(
        FT_DATASET_NAME=f"{tmp_path}/many.jsonl*2.5, {tmp_path}/few.jsonl*0.5", FT_DATASET_SPLIT="train", FT_EVAL_SPLIT="0.2",
        FT_STAGES="prepare",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    run = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"
    found = json.loads((run / "prepare" / "data_report.json").read_text(encoding="utf-8"))
    assert found["overlap"] == 0
    assert found["eval"]["rows"] == 5  # of the 20 and 5 rows that are used at all
    assert found["eval"]["duplicates"] == 0
    assert 50 + 5 - 5 * 3 <= found["train"]["rows"] <= 50 + 5 - 5
    none = job.run(FT_DATASET_NAME=f"{tmp_path}/few.jsonl", FT_DATASET_SPLIT="train[:1]", FT_EVAL_SPLIT="0.5", FT_STAGES="prepare", FT_RUN_ID="one")  # fmt: skip
    assert none.code == 65
    assert "FT_EVAL_SPLIT=0.5 of 1 rows leaves none to train on" in none.error["message"]
