"""Every row format is recognised, and what is not acceptable is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset

from job.data.formats import Malformed, choose_format, load_split
from job.data.templates import LLAMA_2, load_tokenizer, set_chat_template
from job.errors import InputError

RAW = "### Human: Hi\nthere### Assistant: Hello.\n### A heading\nMore.### Human: Bye### Assistant: Bye."


def read(row: dict[str, Any], wanted: str = "auto", text_field: str = "text") -> Any:
    return choose_format(wanted, text_field, list(row), [row]).read(row, text_field)


def test_the_format_is_found_from_the_columns_and_the_rows() -> None:
    assert choose_format("auto", "text", ["text"], [{"text": "<s>[INST] a [/INST] b </s>"}]).name == "text"
    assert choose_format("auto", "text", ["text"], [{"text": "a"}, {"text": RAW}]).name == "human_assistant"
    assert choose_format("auto", "text", ["messages", "text"], [{}]).name == "messages"
    assert choose_format("auto", "text", ["prompt", "completion"], [{}]).name == "prompt_completion"
    assert choose_format("auto", "body", ["body"], [{"body": "a"}]).name == "text"


def test_human_assistant_rows_become_turns_and_headings_inside_an_answer_stay() -> None:
    turns = read({"text": RAW}).messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    assert turns[1]["content"] == "Hello.\n### A heading\nMore."


def test_an_unanswered_question_is_left_out() -> None:
    assert len(read({"text": RAW + "### Human: And?"}).messages) == 4
    with pytest.raises(Malformed):
        read({"text": "### Human: Anyone?"}, "human_assistant")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": ["hello"]},
        {"messages": [{"role": "user", "content": None}]},
    ],
)
def test_a_malformed_conversation_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        read(row)


def test_a_missing_column_is_named_along_with_the_existing_ones() -> None:
    with pytest.raises(
        InputError, match=r"no column text, which FT_DATASET_FORMAT=text needs\. It has question, answer"
    ) as caught:
        choose_format("text", "text", ["question", "answer"], [{}])
    assert caught.value.exit_code == 65
    assert "FT_DATASET_TEXT_FIELD" in caught.value.hint
    with pytest.raises(InputError, match="match none of the known formats"):
        choose_format("auto", "text", ["question", "answer"], [{}])


def test_an_empty_dataset_and_a_missing_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "rows.jsonl"
    file.write_text('{"text": "one"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="no split 'test'"):
        load_split(tmp_path / "data", "test", None, tmp_path / "cache")
    with pytest.raises(InputError, match=r"'train\[:0\]' is empty"):
        load_split(tmp_path / "data", "train[:0]", None, tmp_path / "cache")
    file.unlink()
    (tmp_path / "data" / "rows.csv").write_text("text\n", encoding="utf-8")
    with pytest.raises(InputError, match="'train' is empty"):
        load_split(tmp_path / "data", "train", None, tmp_path / "cache-2")


def test_a_single_file_is_the_train_split_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "oa_val_test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert len(load_split(tmp_path, "train[:1]", None, tmp_path / "cache")) == 1


def test_the_reformatted_raw_rows_match_the_published_dataset(shared_data: Path) -> None:
    """All 997 raw conversations become, to the letter, rows of mlabonne/guanaco-llama2-1k."""
    parquet = next((shared_data / "datasets" / "guanaco-llama2-1k").glob("*.parquet"))
    expected = set(load_dataset("parquet", data_files=str(parquet), split="train")["text"])
    tokenizer = load_tokenizer(shared_data / "models" / "stories15M")
    assert set_chat_template(tokenizer, "llama-2") == "llama-2"
    assert tokenizer.chat_template == LLAMA_2
    lines = (shared_data / "datasets" / "guanaco_1k_human_assistant.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [tokenizer.apply_chat_template(read(json.loads(line)).messages, tokenize=False) for line in lines]
    assert len(texts) == 997
    assert [text for text in texts if text not in expected] == []
