"""Rows are encoded on all cores, in order, each exactly once, whatever the number of processes and whatever is wrong with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data import engine
from job.errors import InputError
from job.run import Run
from job.stages import prepare as stage
from tests.conftest import LIGHTHOUSE

Make = Callable[..., Run]


@pytest.fixture
def prepared(make_run: Callable[..., Run], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Prepare rows (or a file) and return the run."""
    numbers = iter(range(1000))
    monkeypatch.setattr(stage, "limit_files", lambda largest: None)  # it would hold for all tests of this process

    def make(rows: list[Any] | Path, **environment: str) -> Run:
        folder = tmp_path / f"run-{next(numbers)}"
        file = rows if isinstance(rows, Path) else folder / "rows.jsonl"
        if not isinstance(rows, Path):
            folder.mkdir()
            text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
            file.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
        for name in [name for name in os.environ if name.startswith("FT_") and name != "FT_ENV_FILE"]:
            monkeypatch.delenv(name)  # what an earlier call set
        run = make_run(
            **{"OUTPUT_DIR": str(folder / "out"), "DATASET_NAME": str(file), "CHAT_TEMPLATE": "chatml", **environment}
        )
        run.paths.model_dir.parent.mkdir(parents=True)
        run.paths.model_dir.symlink_to(tiny_model)
        run.paths.dataset_dir.mkdir()
        (run.paths.dataset_dir / file.name).symlink_to(file)
        stage.prepare(run)
        return run

    return make


def report(run: Run, part: str = "train") -> dict[str, Any]:
    return dict(json.loads(run.paths.data_report_file.read_text(encoding="utf-8"))[part])


def digests(run: Run) -> dict[str, str]:
    folder = run.paths.stage_dir("prepare")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("data_report.json", "data_report.html")
    }


def documents(run: Run, part: str = "train") -> list[list[int]]:
    from datasets import load_from_disk

    rows = load_from_disk(str(run.paths.train_data_dir if part == "train" else run.paths.eval_data_dir))
    return [list(ids) for ids in rows["input_ids"]]


def test_one_two_and_four_processes_write_the_same_bytes(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "word " * (number % 50 + 1)}]}
        for number in range(7000)
    ]  # fmt: skip
    rows[100] = rows[6900] = {"messages": []}
    found = []
    for workers in (1, 2, 4):
        monkeypatch.setattr(stage, "cores", lambda count=workers: count)
        run = prepared(rows, PACKING="true", MAX_SEQ_LENGTH="128")
        found.append((digests(run), report(run) | {"first_row": None}))
    assert found[0] == found[1] == found[2]
    assert [row["place"] for row in found[0][1]["reasons"][0]["first"]] == [
        "rows.jsonl, line 101",
        "rows.jsonl, line 6,901",
    ]


def test_a_changed_row_template_or_tokenizer_changes_the_fingerprint(
    prepared: Make, tmp_path: Path, tiny_model: Path
) -> None:
    """The fingerprint says what the rows were made from. Only what is the same is taken from the store."""
    from job.stages.inputs import digest

    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
    first = prepared([row] * 12)
    assert json.loads(first.paths.data_report_file.read_text(encoding="utf-8"))["inputs"] == digest(first)
    before = digest(first)
    data = next(first.paths.dataset_dir.iterdir())
    text = data.read_text(encoding="utf-8")
    data.resolve().write_text(text.replace("Yes", "No."), encoding="utf-8")
    changed = digest(first)
    data.resolve().write_text(text, encoding="utf-8")
    assert digest(first) == before != changed
    import shutil

    first.paths.model_dir.unlink()
    shutil.copytree(tiny_model, first.paths.model_dir)
    assert digest(first) == before
    (first.paths.model_dir / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert digest(first) != before


def test_rows_that_are_long_malformed_or_doubled_are_counted_once(prepared: Make) -> None:
    good = [{"text": f"Row {number}."} for number in range(40)]
    rows = [*good, good[0], {"text": ""}, {"text": None}, {"text": "word " * 400}]
    found = report(prepared(rows, MAX_SEQ_LENGTH="32", MAX_BAD_ROWS="2"))
    counted = {name: found[name] for name in ("rows_read", "rows", "malformed_rows", "truncated_rows", "duplicates")}
    assert counted == {"rows_read": 44, "rows": 42, "malformed_rows": 2, "truncated_rows": 1, "duplicates": 1}
    assert {reason["reason"]: reason["rows"] for reason in found["reasons"]} == {"column text is empty": 2} or len(
        found["reasons"]
    ) == 1
    assert report(prepared(rows, MAX_SEQ_LENGTH="32", MAX_BAD_ROWS="2", DEDUPLICATE="true"))["rows"] == 41


def test_first_rows_that_are_malformed_do_not_matter_within_the_limit(prepared: Make) -> None:
    rows = [{"text": ""}] * 1100 + [{"text": f"Row {number}."} for number in range(11000)]
    found = report(prepared(rows))
    assert (found["malformed_rows"], found["rows"]) == (1100, 11000)
    assert found["reasons"][0]["first"][0]["place"] == "rows.jsonl, line 1"
    with pytest.raises(InputError, match=r"1,300 of 12,300 train rows cannot be used as text"):
        prepared([{"text": ""}] * 200 + rows)


@pytest.mark.parametrize(
    ("rows", "environment", "told"),
    [
        ([{"text": "a"}, "{"], {}, r"rows\.jsonl, line 2: it is not JSON"),
        ([{"text": "a"}, {"text": ""}], {"BAD_ROWS": "fail"}, r"rows\.jsonl, line 2: column text is empty"),
        ([{"text": "a"}] * 3 + ["{"] * 2, {"BAD_ROWS": "drop"}, "2 of 5 train rows"),
        ([{"text": "word " * 60}] * 3 + [{"text": "a"}] * 2, {"MAX_SEQ_LENGTH": "32"}, "3 of 5 train rows are longer than 32 tokens"),
        ([{"text": "a"}], {"TRAIN_ON": "assistant"}, "no part of them is the assistant's"),
        ([{"prompt": "word " * 90, "completion": ""}] , {"MAX_SEQ_LENGTH": "32"}, "cannot be used as prompt_completion"),
        ([{"prompt": "word " * 90, "completion": "b"}], {"MAX_SEQ_LENGTH": "32"}, "No train row has any token left to learn"),
        ([{"prompt": "word " * 300, "completion": "b"}], {"MAX_SEQ_LENGTH": "256", "TOO_LONG": "cut_left"}, "less than 1%"),
        ([{"messages": [{"role": "user", "content": "<s>"}, {"role": "assistant", "content": "b"}]}], {"CHAT_TEMPLATE": "TEMPLATE:{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"}, "two begin-of-sequence tokens"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], {"CHAT_TEMPLATE": "TEMPLATE:{% for m in messages %}{{ m.role + ': ' + m.content + '. ' }}{% endfor %}"}, "the end of a turn"),
        ([{"messages": [{"role": "assitant", "content": "a"}]}], {}, "has the role 'assitant'"),
    ],
)  # fmt: skip
def test_data_that_no_training_can_be_meant_by_is_refused(
    prepared: Make, tmp_path: Path, rows: list[Any], environment: dict[str, str], told: str
) -> None:
    if environment.get("CHAT_TEMPLATE", "").startswith("TEMPLATE:"):
        file = tmp_path / "template.jinja"
        file.write_text(environment["CHAT_TEMPLATE"].removeprefix("TEMPLATE:"), encoding="utf-8")
        environment = environment | {"CHAT_TEMPLATE": str(file)}
    with pytest.raises(InputError, match=told) as caught:
        prepared(rows, **environment)
    assert caught.value.exit_code == 65
    if "assitant" in told:
        assert 'FT_DATASET_ROLES={"assitant": "assistant"}' in caught.value.hint


@pytest.mark.parametrize(
    ("columns", "told", "advice"),
    [
        ({"system": "syst"}, "reads 'system' from the column 'syst'", "Did you mean 'sys'?"),
        ({"answer": "nope"}, "reads 'answer' from the column 'nope'", "They have ask, reply, sys."),
    ],
)
def test_a_column_that_the_rows_do_not_have_is_named(
    prepared: Make, columns: dict[str, str], told: str, advice: str
) -> None:
    """Otherwise every system prompt is lost without a word, or the rows are blamed."""
    rows = [{"ask": f"What is {number}?", "reply": f"It is {number}.", "sys": "Be brief."} for number in range(4)]
    named = {"question": "ask", "answer": "reply", "system": "sys"}
    assert report(prepared(rows, DATASET_COLUMNS=json.dumps(named)))["rows"] == 4
    with pytest.raises(InputError, match=told) as caught:
        prepared(rows, DATASET_COLUMNS=json.dumps(named | columns))
    assert advice in caught.value.hint


def test_a_column_that_only_some_rows_have_may_be_named(prepared: Make) -> None:
    rows: list[Any] = [{"ask": f"What is {number}?", "reply": f"It is {number}."} for number in range(4)]
    rows[2]["note"] = "!"
    named = {"question": "ask", "answer": "reply", "system": "instruction_to_the_model"}
    assert report(prepared(rows, DATASET_COLUMNS=json.dumps(named)))["rows"] == 4


def test_one_broken_line_is_left_out_where_that_is_asked(prepared: Make) -> None:
    found = report(prepared([{"text": "one"}, {"text": "two"}, "{"], BAD_ROWS="drop"))
    assert (found["rows"], found["malformed_rows"]) == (2, 1)


def test_tokens_beyond_the_embeddings_are_refused_before_a_gpu_works(
    prepared: Make, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "vocabulary", lambda config: 300)
    with pytest.raises(InputError, match="has embeddings for 300 only"):
        prepared([{"text": "The lamp of the keeper is lit."}] * 3)
    assert stage.vocabulary({"text_config": {"vocab_size": 7}}) is not None


def test_a_part_is_held_out_and_a_sample_drawn_without_losing_or_doubling_a_row(prepared: Make) -> None:
    rows = [{"text": f"Row {number}."} for number in range(100)]
    run = prepared(rows, EVAL_SPLIT="0.1")
    train, held_out = documents(run), documents(run, "eval")
    assert (len(train), len(held_out)) == (90, 10)
    assert len({tuple(row) for row in (*train, *held_out)}) == 100
    import numpy as np

    chosen = np.random.default_rng(42).permutation(100)[:10]  # as datasets' train_test_split chooses
    whole = documents(prepared(rows))
    assert sorted(held_out) == sorted(whole[index] for index in chosen)
    some = prepared(rows, EVAL_SPLIT="0.1", DATASET_SAMPLE="50")
    assert (len(documents(some)), len(documents(some, "eval"))) == (45, 5)
    assert documents(some) == documents(prepared(rows, EVAL_SPLIT="0.1", DATASET_SAMPLE="50"))


def test_rows_that_are_trained_and_evaluated_on_are_counted(prepared: Make) -> None:
    run = prepared([{"text": f"Row {number % 5}."} for number in range(20)], EVAL_SPLIT="0.5")
    assert json.loads(run.paths.data_report_file.read_text(encoding="utf-8"))["overlap"] > 0


def test_conversations_learn_the_assistants_part_by_default_and_all_of_it_where_an_earlier_version_began(
    prepared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report(prepared(LIGHTHOUSE))["trained_on"] == "the assistant's part"
    for environment in ({"TRAIN_ON": "all"}, {"ASSISTANT_ONLY_LOSS": "false"}):
        assert report(prepared(LIGHTHOUSE, **environment))["trained_on"] == "everything"
    assert report(prepared(LIGHTHOUSE, ASSISTANT_ONLY_LOSS="true"))["trained_on"] == "the assistant's part"
    monkeypatch.setenv("JOB_TRAIN_ON", "all")
    assert report(prepared(LIGHTHOUSE))["trained_on"] == "everything"


def test_folders_with_other_files_beside_the_data_are_read(
    prepared: Make, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    from job.data.splits import find_splits

    folder = tmp_path / "data"
    folder.mkdir()
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
    (folder / "a.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({**chat, "source": "x"}) + "\n", encoding="utf-8")
    for name in ("dataset_infos.json", "README.txt", "requirements.txt", "LICENSE.txt", "state.json", "croissant.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    assert [file.name for file in find_splits(folder, None)["train"]] == ["a.jsonl", "b.jsonl"]
    (folder / "a.csv").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"files of several kinds.*a\.csv \(csv\), a\.jsonl \(json\)"):
        find_splits(folder, None)


def test_files_that_no_split_has_are_named(tmp_path: Path) -> None:
    from job.data.files import FileOptions
    from job.data.selection import select

    told: list[str] = []
    options = FileOptions(tell=told.append)
    names = ["part_a.jsonl", "part_b.jsonl"]
    for name in names:
        (tmp_path / name).write_text('{"text": "x"}\n', encoding="utf-8")
    assert len(select(tmp_path, "train", None, options, variable="FT_DATASET_SPLIT").files()) == 2
    assert told == []
    (tmp_path / "train_extra.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    (tmp_path / "README.txt").write_text("x", encoding="utf-8")
    chosen = select(tmp_path, "train", None, options, variable="FT_DATASET_SPLIT")
    assert [file.name for file in chosen.files()] == ["train_extra.jsonl"]
    (sentence,) = told
    assert sentence.endswith("named like splits and these are not: part_a.jsonl, part_b.jsonl.")


def test_what_the_datasets_library_saved_is_read_with_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    from job.data.files import FileOptions
    from job.data.selection import select

    rows = Dataset.from_dict({"text": ["one", "two", "three"]})
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict({"train_sft": rows, "extra": rows.select([2])}).save_to_disk(tmp_path / "several")

    def texts(folder: str, split: str) -> list[str]:
        found = select(tmp_path / folder, split, None, FileOptions(), variable="FT_DATASET_SPLIT")
        return [row["text"] for batch in found.batches(FileOptions()) for _, row in batch.rows()]  # type: ignore[index]

    assert texts("plain", "train") == ["one", "two", "three"]
    assert texts("several", "extra") == ["three"]
    assert texts("several", "train") == ["one", "two", "three"]  # the only split that can be meant
    assert texts("several", "extra+train_sft[1:]") == ["three", "two", "three"]
    assert texts("several", "train_sft[-1:]") == ["three"]
    with pytest.raises(InputError, match=r"has no split 'test'\. It has extra, train_sft") as caught:
        texts("several", "test")
    assert "FT_DATASET_SPLIT" in caught.value.hint


# -- any rows at all ----------------------------------------------------------------------------------------------------------

_TEXTS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"), min_size=1, max_size=40
).filter(str.strip)
_FAULTS = st.sampled_from(["", "{", "[1]", '{"messages": 3}', '{"messages": [{"role": "user"}]}', '"text"', "\x00", '{"messages": [{"role": "user", "content": "only"}]}'])  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    turns = [{"role": "system", "content": draw(_TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [{"role": "user", "content": draw(_TEXTS)}, {"role": "assistant", "content": draw(_TEXTS)}]
    return {"messages": turns}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.one_of(conversations(), _FAULTS), min_size=1, max_size=12), st.sampled_from(["chatml", "llama-2"]))
def test_any_rows_are_decoded_as_they_were_rendered_and_every_bad_one_is_counted_with_its_number(
    prepared: Make, rows: list[Any], template: str
) -> None:
    from datasets import load_from_disk

    from job.data.templates import load_tokenizer, set_chat_template

    good = [row for row in rows if isinstance(row, dict)]
    if not good:
        return
    run = prepared(
        rows,
        MAX_SEQ_LENGTH="256",
        PACKING="true",
        BAD_ROWS="drop",
        MAX_BAD_ROWS="1000",
        TOO_LONG="split",
        CHAT_TEMPLATE=template,
    )
    found = report(run)
    wrong = [number for number, row in enumerate(rows, 1) if isinstance(row, str) and row.strip()]
    places = sorted(row["place"] for reason in found["reasons"] for row in reason["first"])
    assert found["malformed_rows"] == len(wrong)
    assert len(wrong) > 5 or places == sorted(f"rows.jsonl, line {number}" for number in wrong)
    tokenizer = load_tokenizer(run.paths.model_dir)
    set_chat_template(tokenizer, template)
    expected = {}
    for row in good:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= 256:
            expected[tuple(ids)] = expected.get(tuple(ids), 0) + 1
    pieces: dict[tuple[int, ...], int] = {}
    for packed in load_from_disk(str(run.paths.train_data_dir)):
        start = 0
        for length in packed["seq_lengths"]:
            piece = tuple(packed["input_ids"][start : start + length])
            pieces[piece] = pieces.get(piece, 0) + 1
            start += length
    assert all(pieces.get(ids, 0) >= count for ids, count in expected.items())  # nothing lost or cut
    split = found["split_rows"]
    assert sum(pieces.values()) == len(good) if not split else sum(pieces.values()) > len(good) - split


def killed(batch: Any) -> Any:
    """One worker dies; the other has results that nobody reads any longer."""
    if batch.numbers[0] == 3501:
        os.kill(os.getpid(), signal.SIGKILL)
    assert engine._work is not None
    return engine._work(batch)


def test_a_worker_that_is_killed_ends_the_stage_and_is_not_waited_for(
    prepared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    monkeypatch.setattr(stage, "cores", lambda: 2)
    monkeypatch.setattr(stage, "no_child_killed", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(engine, "_encode", killed)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in a stage, with which the pool would end the others
    try:
        with pytest.raises(BrokenProcessPool):
            prepared([{"text": f"Row {number}: {'word ' * 60}"} for number in range(8000)])
    finally:
        signal.signal(signal.SIGTERM, before)
