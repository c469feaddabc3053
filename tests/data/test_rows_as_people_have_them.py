"""Each kind of row and file that people bring becomes the right tokens and labels, or is refused by its name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from job.data.conversations import Reading
from job.data.formats import FORMATS
from job.errors import InputError
from tests.data.chat_templates import of_trl
from tests.data.conftest import Found, by_hand
from tests.data.test_chat_templates import CALLS, REASONED, TOOLS

Read = Callable[..., Found]
ASKED, ANSWERED = {"role": "user", "content": "Is it lit?"}, {"role": "assistant", "content": "Yes."}
CHAT = {"messages": [ASKED, ANSWERED]}
LIT = "<s>[INST] Is it lit? [/INST]⟦ Yes. </s>⟧"


def lines(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return file


def same(found: Found, *marked: str) -> None:
    """Compare every token and every label with those marked by hand."""
    assert [bad.reason for bad in found.bad] == []
    assert found.documents == [by_hand(found.tokenizer, text) for text in marked]


def qa(question: str, answer: str) -> str:
    return f"<s>[INST] {question} [/INST]⟦ {answer} </s>⟧"


# The column layouts of well-known sets for supervised fine-tuning, with rows of our own
LAYOUTS: dict[str, tuple[Any, str, str]] = {
    "tatsu-lab/alpaca": ({"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "Below is …"}, "alpaca", qa("Add.\n2 and 3", "5")),
    "yahma/alpaca-cleaned": ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, "alpaca", qa("Name a colour.", "Blue.")),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Who is it?", "context": "It is Ada.", "response": "Ada.", "category": "closed_qa"}, "dolly", qa("Who is it?\nIt is Ada.", "Ada."),
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Is it lit?", "prompt_id": "7", "messages": [ASKED, ANSWERED]}, "messages", LIT,
    ),
    "HuggingFaceH4/no_robots": (
        {"prompt": "Is it lit?", "prompt_id": "7", "messages": [ASKED, ANSWERED], "category": "Chat"}, "messages", LIT,
    ),
    "allenai/tulu-3-sft-mixture": ({"id": "1", "messages": [ASKED, ANSWERED], "source": "x"}, "messages", LIT),
    "teknium/OpenHermes-2.5": (
        {"conversations": [{"from": "human", "value": "Is it lit?", "weight": None}, {"from": "gpt", "value": "Yes."}], "system_prompt": None, "title": None},
        "messages", LIT,
    ),
    "Open-Orca/SlimOrca": (
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None}, {"from": "human", "value": "Is it lit?", "weight": 0.0}, {"from": "gpt", "value": "Yes.", "weight": 1.0}]},
        "messages", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it lit? [/INST]⟦ Yes. </s>⟧",
    ),
    "Open-Orca/OpenOrca": (
        {"id": "1", "system_prompt": "", "question": "Is it lit?", "response": "Yes."}, "question_answer", LIT,
    ),
    "GAIR/lima": ({"conversations": ["Is it lit?", "Yes."], "source": "x"}, "messages", LIT),
    "meta-math/MetaMathQA": (
        {"type": "x", "query": "1+1?", "original_question": "one and one?", "response": "2"}, "question_answer", qa("1+1?", "2"),
    ),
    "microsoft/orca-math-word-problems-200k": ({"question": "1+1?", "answer": "2"}, "question_answer", qa("1+1?", "2")),
    "LDJnr/Capybara": (
        {"source": "x", "conversation": [{"input": "Is it lit?", "output": "Yes."}, {"input": "Sure?", "output": "Sure."}]},
        "messages", f"{LIT}<s>[INST] Sure? [/INST]⟦ Sure. </s>⟧",
    ),
    "timdettmers/openassistant-guanaco": ({"text": "### Human: Is it lit?### Assistant: Yes."}, "human_assistant", LIT),
    "openai/gsm8k": ({"question": "1+1?", "answer": "2"}, "question_answer", qa("1+1?", "2")),
    "AI-MO/NuminaMath-CoT": (
        {"source": "x", "problem": "1+1?", "solution": "2", "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]},
        "messages", qa("1+1?", "2"),
    ),
    "HuggingFaceTB/smoltalk": ({"messages": [ASKED, ANSWERED], "source": "x"}, "messages", LIT),
    "prompt and response": ({"prompt": "Is it lit?", "response": "Yes."}, "question_answer", LIT),
    "capital letters": ({"Question ": "Is it lit?", "Answer": "Yes."}, "question_answer", LIT),
    "a conversation as a text of JSON": ({"messages": json.dumps([ASKED, ANSWERED])}, "messages", LIT),
    "parts of text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": " lit?"}]}, ANSWERED]}, "messages", LIT),
    "ChatGPT's words": ({"dialogue": [{"speaker": "Human", "text": "Is it lit?"}, {"speaker": "Bot", "text": "Yes."}]}, "messages", LIT),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_layouts_of_well_known_sets_are_read_as_they_are(
    read: Read, tmp_path: Path, layout: str, kind: str
) -> None:
    row, form, marked = LAYOUTS[layout]
    if kind == "parquet" and layout == "parts of text":
        row = {"messages": json.dumps(row["messages"])}  # a column of Arrow has one type
    if kind == "parquet":
        file = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([row, row]), file)
    else:
        file = lines(tmp_path, row, row)
    found = read(file)
    assert found.format == form
    same(found, marked, marked)


def test_three_columns_win_over_a_text_beside_them_and_it_is_said(read: Read, tmp_path: Path) -> None:
    found = read(lines(tmp_path, LAYOUTS["tatsu-lab/alpaca"][0]))
    assert found.told == ["the column text is not used, because the rows are alpaca (FT_DATASET_FORMAT=text uses it)"]


def test_a_column_named_as_text_that_is_half_of_a_row_is_refused(read: Read, tmp_path: Path) -> None:
    file = lines(tmp_path, {"instruction": "Add.", "input": "", "output": "5"})
    with pytest.raises(InputError, match="the rest of each row, such as the question, would not be trained on"):
        read(file, text_field="output")
    assert read(file, text_field="output", wanted="text").texts() == ["<s>5</s>"]


# -- what is learned ----------------------------------------------------------------------------------------------------


def test_weights_decide_what_is_learned(read: Read, tmp_path: Path) -> None:
    for key, off in (("weight", 0), ("weight", 0.0), ("train", False), ("trainable", "false"), ("loss", False)):
        turns = [
            ASKED,
            {"role": "assistant", "content": "No.", key: off},
            ASKED,
            ANSWERED | {key: True if off is False else 1},
        ]
        marked = f"<s>[INST] Is it lit? [/INST] No. </s>{LIT}"
        same(read(lines(tmp_path, {"messages": turns})), marked)
    everything = read(lines(tmp_path, {"messages": turns}), train_on="all")
    same(everything, f"⟦<s>[INST] Is it lit? [/INST]⟧ No. </s>⟦{LIT.replace('⟦', '').replace('⟧', '')}⟧")
    half = read(lines(tmp_path, {"messages": [ASKED, ANSWERED | {"weight": 0.5}]}))
    assert half.bad[0].reason == "message 2 has weight 0.5: only 0 and 1, or false and true, are possible"


def test_calls_of_tools_in_openais_form_are_learned_with_content_empty_or_null(read: Read, tmp_path: Path) -> None:
    for content in ("", None):
        turns = [CALLS[0], CALLS[1] | {"content": content}, *CALLS[2:]]
        found = read(lines(tmp_path, {"messages": turns, "tools": TOOLS}), template=of_trl("qwen2_5"), max_length=4096)
        assert found.bad == []
        text = found.texts()[0]
        assert '"name": "look_up"' in text.split("<|im_start|>user")[0]
        assert found.learned() == [
            '\n<tool_call>\n{"name": "look_up", "arguments": {"word": "lamp"}}\n</tool_call><|im_end|>\n\nA light.<|im_end|>\n'
        ]
    refused = read(lines(tmp_path, {"messages": CALLS, "tools": TOOLS}))
    assert refused.documents == []
    assert (refused.bad[0].reason, refused.bad[0].wrong) == ("the chat template leaves out the tools", True)


def test_arguments_and_tools_from_parquet_have_no_nulls_of_other_rows(read: Read, tmp_path: Path) -> None:
    """Arrow gives every struct all fields of all rows; axolotl#3824."""

    def row(arguments: dict[str, str]) -> dict[str, Any]:
        call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        turns = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return {
            "messages": turns,
            "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"properties": arguments}}}],
        }

    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row({"word": "lamp"}), row({"city": "Oslo"})]), file)
    found = read(file, template=of_trl("qwen2_5"), max_length=4096)
    assert found.bad == []
    assert "null" not in "".join(found.texts())
    assert '{"word": "lamp"}' in found.learned()[0]
    assert '{"city": "Oslo"}' in found.learned()[1]


def test_reasoning_is_learned_where_the_template_has_it_and_refused_by_name_where_not(
    read: Read, tmp_path: Path
) -> None:
    file = lines(tmp_path, {"messages": REASONED})
    assert read(file, template=of_trl("qwen3")).learned() == ["<think>\none and one\n</think>\n\n2<|im_end|>\n"]
    refused = read(file)
    assert refused.bad[0].reason == "the chat template leaves out the reasoning_content of message 2 (assistant)"
    assert refused.bad[0].wrong
    same(read(file, ignored_keys=frozenset({"reasoning_content"})), qa("1+1?", "2"))


def test_roles_of_other_words_are_mapped_and_told_once(read: Read, tmp_path: Path) -> None:
    turns = [{"role": "human", "content": "Is it lit?"}, {"role": "gpt", "content": "Yes."}]
    found = read(lines(tmp_path, *[{"messages": turns}] * 3))
    same(found, LIT, LIT, LIT)
    assert found.told == ["the role 'human' is read as user", "the role 'gpt' is read as assistant"]
    odd = lines(
        tmp_path, {"messages": [{"role": "pupil", "content": "Is it lit?"}, {"role": "teacher", "content": "Yes."}]}
    )
    assert "has the role 'pupil'" in read(odd).bad[0].reason
    same(read(odd, roles={"pupil": "user", "teacher": "assistant"}), LIT)


def test_rows_of_preferences_are_refused_by_name_and_read_when_asked(read: Read, tmp_path: Path) -> None:
    pairs = lines(tmp_path, {"prompt": "Is it lit?", "chosen": "Yes.", "rejected": "Go away."})
    with pytest.raises(InputError, match="preference rows") as caught:
        read(pairs)
    assert "FT_DATASET_FORMAT=chosen" in caught.value.hint
    same(read(pairs, wanted="chosen"), LIT)
    turns = lines(tmp_path, {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {"role": "assistant", "content": "No."}]})
    same(read(turns, wanted="chosen"), LIT)
    labelled = lines(
        tmp_path,
        {"prompt": "Say hi", "completion": " Hello.", "label": True},
        {"prompt": "Say hi", "completion": " Go away.", "label": False},
    )
    with pytest.raises(InputError, match="the bad ones would be learned too") as caught:
        read(labelled)
    assert "FT_DATASET_FORMAT=kto" in caught.value.hint
    wanted = read(labelled, wanted="kto")
    assert wanted.learned() == [" Hello.</s>"]
    assert wanted.counts["not_wanted"] == 1


def test_trees_become_threads_with_the_best_ranked_answers(read: Read, tmp_path: Path) -> None:
    def message(name: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}

    rows = [
        message("d", "b", "prompter", "Sure?"),
        message("a", None, "prompter", "Is it lit?"),
        message("c", "a", "assistant", "Go away.", 1),
        message("b", "a", "assistant", "Yes.", 0),
        message("e", "d", "assistant", "Sure.", 0),
        message("f", None, "prompter", "Anyone?"),
    ]
    found = read(lines(tmp_path, *rows))
    assert found.documents == [by_hand(found.tokenizer, f"{LIT}<s>[INST] Sure? [/INST]⟦ Sure. </s>⟧")]
    assert [(bad.place, bad.reason) for bad in found.bad] == [("rows.jsonl, line 6", "nobody answered it")]
    nested = {"message_tree_id": "a", "tree_state": "ready", "prompt": {"role": "prompter", "text": "Is it lit?", "message_id": "a", "replies": [
        {"role": "assistant", "text": "Go away.", "rank": 1, "message_id": "c", "replies": []}, {"role": "assistant", "text": "Yes.", "rank": 0, "message_id": "b", "replies": []}]}}  # fmt: skip
    same(read(lines(tmp_path, nested)), LIT)


def test_llama_2_text_is_taken_apart_where_that_is_asked(read: Read, tmp_path: Path) -> None:
    text = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it lit? [/INST] Yes. </s><s>[INST] Sure? [/INST] Sure. </s>"
    file = lines(tmp_path, {"text": text})
    assert read(file).format == "text"
    same(
        read(file, wanted="llama2"),
        text.replace("] Yes. </s>", "]⟦ Yes. </s>⟧").replace("] Sure. </s>", "]⟦ Sure. </s>⟧"),
    )
    assert read(lines(tmp_path, {"text": "no marks"}), wanted="llama2").bad[0].reason.startswith("it is not [INST]")


# -- odd conversations ---------------------------------------------------------------------------------------------------


def test_odd_conversations_are_learned_where_the_template_allows_and_else_left_out_by_their_reason(
    read: Read, tmp_path: Path
) -> None:
    welcome = lines(tmp_path, {"messages": [{"role": "assistant", "content": "Welcome."}, ASKED, ANSWERED]})
    assert "alternate" in read(welcome).bad[0].reason
    assert read(welcome, template="chatml").learned() == ["Welcome.<|im_end|></s>\nYes.<|im_end|></s>\n"]
    twice = lines(tmp_path, {"messages": [ASKED, ANSWERED, {"role": "assistant", "content": "Well?"}]})
    assert read(twice, template="chatml").learned() == ["Yes.<|im_end|></s>\nWell?<|im_end|></s>\n"]
    unanswered = lines(tmp_path, {"messages": [ASKED, ANSWERED, ASKED]})
    same(read(unanswered), f"{LIT}<s>[INST] Is it lit? [/INST]")
    nobody = read(lines(tmp_path, {"messages": [ASKED]}))
    assert nobody.bad[0].reason == "nothing to learn: no message is the assistant's"
    silent = read(lines(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": " "}]}))
    assert silent.bad[0].reason == "message 2, the assistant's, is empty"


def test_the_last_answer_alone_is_learned_where_that_is_asked(read: Read, tmp_path: Path) -> None:
    file = lines(tmp_path, {"messages": [ASKED, ANSWERED, ASKED, ANSWERED]})
    same(read(file, train_on="last"), f"<s>[INST] Is it lit? [/INST] Yes. </s>{LIT}")


def test_prompt_and_completion_as_messages_learn_the_completion(read: Read, tmp_path: Path) -> None:
    file = lines(tmp_path, {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    same(read(file), f"<s>[INST] Is it lit? [/INST] Yes. </s>{LIT}")
    found = read(file, template=of_trl("deepseek_r1_distill"))
    assert found.learned() == ["<｜Assistant｜>Yes.<｜end▁of▁sentence｜>"]


def test_an_empty_completion_is_bad_by_that_reason_and_an_empty_prompt_is_not(read: Read, tmp_path: Path) -> None:
    file = lines(
        tmp_path, {"prompt": "Hi", "completion": ""}, {"prompt": "", "completion": "Yes"}, {"prompt": "Hi", "completion": None},
        {"prompt": "Hi", "completion": " Yes"},
    )  # fmt: skip
    found = read(file)
    assert found.documents == [by_hand(found.tokenizer, "<s>⟦Yes</s>⟧"), by_hand(found.tokenizer, "<s>Hi⟦ Yes</s>⟧")]
    assert [(bad.place, bad.reason) for bad in found.bad] == [
        ("rows.jsonl, line 1", "column completion is empty"),
        ("rows.jsonl, line 3", "column completion is empty"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add", "input": "", "output": "5", "history": [["one", "two", "three"]]},
        {"instruction": "Add", "input": "", "output": "5", "history": 7},
        {"message_tree_id": "a", "prompt": {"role": "prompter", "replies": [3]}},
    ],
)
def test_values_that_no_format_expects_make_a_bad_row_and_no_bug(
    read: Read, tmp_path: Path, row: dict[str, Any]
) -> None:
    found = read(lines(tmp_path, row))
    assert (found.documents, len(found.bad)) == ([], 1)
    assert found.bad[0].reason.startswith("it does not fit ")


def test_numbers_are_read_as_text_and_that_is_told(read: Read, tmp_path: Path) -> None:
    found = read(
        lines(tmp_path, {"prompt": "Is 2 even? ", "completion": 1}, {"prompt": "Is 3 even? ", "completion": 0})
    )
    assert found.learned() == ["1</s>", "0</s>"]
    assert found.told == ["numbers in column completion are read as text"]


# -- length --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("too_long", ["cut", "cut_left", "drop", "split"])
def test_long_rows_are_shortened_as_asked_and_counted(read: Read, tmp_path: Path, too_long: str) -> None:
    words = " word" * 60
    file = lines(
        tmp_path, {"text": f"First {words}"}, {"text": "Short."}, {"prompt": "unused", "text": f"Third {words}"}
    )
    whole = read(file)
    found = read(file, max_length=32, too_long=too_long)
    (first, _), (short, _), _ = whole.documents
    assert max(len(ids) for ids, _ in found.documents) <= 32
    if too_long == "cut":
        assert found.documents[0][0] == first[:32]
        assert found.counts["cut"] == 2
    elif too_long == "cut_left":
        assert found.documents[0][0] == [first[0], *first[-31:]]
        assert found.counts["cut"] == 2
    elif too_long == "drop":
        assert [ids for ids, _ in found.documents] == [short]
        assert found.counts["too_long"] == 2
    else:
        assert found.counts["split"] == 2
        tokens = [[token for ids, _ in part.documents for token in ids] for part in (found, whole)]
        assert tokens[0] == tokens[1]
    end = found.tokenizer.eos_token_id
    taught = {
        "cut": [False, True, False],
        "cut_left": [True] * 3,
        "drop": [True],
        "split": [False, False, True, True, False, False, True],
    }
    assert [ids[-1] == end for ids, _ in found.documents] == taught[too_long]  # no end that is none


def test_a_prompt_that_fills_the_length_leaves_nothing_and_is_counted(read: Read, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "lamp " * 80}, ANSWERED]}
    found = read(lines(tmp_path, long, CHAT), max_length=40)
    same(found, LIT)
    assert (found.counts["nothing_left"], found.counts["cut"]) == (1, 1)


# -- begin and end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["It is lit.", "<s>It is lit.", " <s>It is lit.</s>", "<s>It is lit.</s> \n", "\n<s>It is lit."]
)
def test_text_has_one_begin_and_one_end_whatever_it_brings(read: Read, tmp_path: Path, text: str) -> None:
    ids, learned = read(lines(tmp_path, {"text": text})).documents[0]
    assert (ids.count(1), ids.count(2), ids[0], ids[-1]) == (1, 1, 1, 2)
    assert all(learned)


def test_a_tokenizer_that_adds_an_end_of_its_own_gives_one(
    read: Read, tokenizer_of: Callable[[str], Any], tmp_path: Path
) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of("llama-2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids, _ = read(lines(tmp_path, {"text": "It is lit."}), tokenizer=tokenizer).documents[0]
    assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)


# -- files -----------------------------------------------------------------------------------------------------------------

_TWO = [CHAT, CHAT]
_TEXT = "\n".join(map(json.dumps, _TWO)) + "\n"
FILES: dict[str, bytes] = {
    "plain.jsonl": _TEXT.encode(),
    "capitals.JSONL": _TEXT.encode(),
    "lines.json": _TEXT.encode(),
    "lines.ndjson": _TEXT.encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + _TEXT.encode(),
    "utf16.jsonl": _TEXT.encode("utf-16"),
    "utf16-without-mark.jsonl": _TEXT.encode("utf-16-le"),
    "blank-lines.jsonl": _TEXT.replace("\n", "\n\n\n").encode(),
    "windows.jsonl": _TEXT.replace("\n", "\r\n").encode(),
    "list.json": json.dumps(_TWO, indent=1).encode(),
    "list.jsonl": json.dumps(_TWO).encode(),
    "list-with-mark.json": b"\xef\xbb\xbf" + json.dumps(_TWO).encode(),
    "two-lists-in-one.json": (json.dumps(_TWO[:1], indent=1) + "\n" + json.dumps(_TWO[1:], indent=1)).encode(),
    "two-lists-in-lines.json": (json.dumps(_TWO[:1]) + "\n" + json.dumps(_TWO[1:]) + "\n").encode(),
    "nested.json": json.dumps({"data": _TWO}).encode(),
    "nested-with-version.json": json.dumps({"version": "1.0", "rows": _TWO}, indent=2).encode(),
    "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in _TWO).encode(),
    "packed.jsonl.gz": gzip.compress(_TEXT.encode()),
    "packed.jsonl.bz2": bz2.compress(_TEXT.encode()),
    "packed.jsonl.xz": lzma.compress(_TEXT.encode()),
    "packed.JSONL.ZST": pa.compress(_TEXT.encode(), codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FILES)
def test_json_is_read_however_it_is_written_and_packed(read: Read, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    same(read(tmp_path / name), LIT, LIT)


@pytest.mark.parametrize("packed", [False, True])
def test_one_long_line_that_holds_all_rows_is_read_whatever_its_length(
    read: Read, tmp_path: Path, packed: bool
) -> None:
    for count in (60, 3000):  # of more and of fewer bytes than are looked at
        rows = [{"question": "q" * 400, "answer": f"a{number}"} for number in range(count)]
        content = json.dumps({"data": rows}).encode()
        file = tmp_path / f"{count}.json{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(content) if packed else content)
        assert len(read(file).documents) == count
    long = {**CHAT, "note": "q" * (2 << 20)}
    assert len(read(lines(tmp_path, long, CHAT)).documents) == 2  # a row with a list of turns is a row


@pytest.mark.parametrize(
    ("content", "why"),
    ids=["text", "list", "document"],
    argvalues=[
        (json.dumps([CHAT], indent=1) + " and more", "row 2: not JSON: something follows after the end of the list"),
        (
            json.dumps([CHAT, {"n": 1}], indent=1).replace("1\n }", "9" * 5000 + "\n }"),
            "row 2: not JSON: Exceeds the limit",
        ),
        (json.dumps({"data": [{"n": 7}]}, indent=1).replace("7", "9" * 5000), "row 1: not JSON: Exceeds the limit"),
    ],
)
def test_what_follows_a_list_and_numbers_of_thousands_of_digits_are_named(
    read: Read, tmp_path: Path, content: str, why: str
) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        read(tmp_path / "rows.json")
    assert f"rows.json, {why}" in refusal.value.message


def test_lines_with_lists_that_hold_no_rows_are_bad_lines(read: Read, tmp_path: Path) -> None:
    found = read(lines(tmp_path, "[1]", "[]", CHAT))
    assert found.documents == [by_hand(found.tokenizer, LIT)]
    assert [bad.place for bad in found.bad] == ["rows.jsonl, line 1", "rows.jsonl, line 2"]


@pytest.mark.parametrize(
    ("row", "marked"),
    [
        ({"prompt": '["b", "a"]', "completion": '["a", "b"]'}, '<s>["b", "a"]⟦["a", "b"]</s>⟧'),
        ({"prompt": "List: ", "completion": '[{"a": 1}]'}, '<s>List: ⟦[{"a": 1}]</s>⟧'),
        ({"question": '[{"id": 1}]', "answer": "one"}, qa('[{"id": 1}]', "one")),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWERED])}, LIT),
    ],
)
def test_a_text_of_json_is_a_conversation_only_if_it_holds_messages(
    read: Read, tmp_path: Path, row: Any, marked: str
) -> None:
    same(read(lines(tmp_path, row)), marked)


def test_a_missing_value_as_pandas_writes_it_is_not_learned_as_text(read: Read, tmp_path: Path) -> None:
    rows = [{"instruction": "What is 2+2?", "input": math.nan, "output": "4"}]
    same(read(lines(tmp_path, *rows)), qa("What is 2+2?", "4"))
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [math.nan, 4.0]}), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert found.learned() == [" 4.0 </s>"]
    assert [bad.reason for bad in found.bad] == ["column answer is empty"]
    found = read(lines(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": math.nan}]}))
    assert [bad.reason for bad in found.bad] == ["message 2 (assistant) has no content"]


def test_a_column_of_system_prompts_is_never_left_out_without_a_word(read: Read, tmp_path: Path) -> None:
    row = {"system": "Speak French.", "prompt": "q", "completion": "a"}
    found = read(lines(tmp_path, row, {**row, "system": " "}))
    assert found.documents == [by_hand(found.tokenizer, "<s>q⟦a</s>⟧")]
    assert [bad.wrong for bad in found.bad] == [True]
    assert found.bad[0].reason.startswith("the column system has no place beside prompt and completion")
    same(
        read(lines(tmp_path, row), columns={"question": "prompt", "answer": "completion"}, wanted="question_answer"),
        "<s>[INST] <<SYS>>\nSpeak French.\n<</SYS>>\n\nq [/INST]⟦ a </s>⟧",
    )
    turns = [{"role": "system", "content": "Speak Dutch."}, ASKED, ANSWERED]
    found = read(lines(tmp_path, {"system": "Speak French.", "messages": turns}))
    assert "the column of system prompts is not used where the messages begin with another one" in found.told
    assert read(lines(tmp_path, {"system": "Speak Dutch.", "messages": turns})).told == []


@pytest.mark.parametrize("form", [("question", "answer"), ("instruction", "response")])
def test_earlier_exchanges_are_read_from_every_kind_of_file(read: Read, tmp_path: Path, form: tuple[str, str]) -> None:
    row = {form[0]: "q2", form[1]: "a2", "context": "", "history": [["q1", "a1"]]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    marked = f"<s>[INST] q1 [/INST]⟦ a1 </s>⟧{qa('q2', 'a2')}"
    for file in (tmp_path / "rows.parquet", lines(tmp_path, row)):
        found = read(file)
        assert "history" in next(one for one in FORMATS if one.name == found.format).uses(Reading())
        same(found, marked)


def test_arrow_values_that_python_cannot_hold_are_bad_where_they_are_needed(read: Read, tmp_path: Path) -> None:
    text = pa.array([b"good", b"na\xefve"]).view(pa.string())
    far = pa.array([10**18, 0], pa.timestamp("us"))
    nowhere = pa.array([0, 0], pa.timestamp("us", tz="Mars/Base"))
    table = pa.table({"question": ["a", "b"], "answer": text, "when": far, "where": nowhere})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert found.learned() == [" good </s>"]
    assert [bad.reason.partition(":")[0] for bad in found.bad] == ["a value cannot be read"]


def test_a_damaged_page_of_parquet_is_named(read: Read, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({"text": [f"It is lit. {number}" * 40 for number in range(500)]}), file, compression="snappy"
    )
    content = bytearray(file.read_bytes())
    content[200:400] = bytes(255 - byte for byte in content[200:400])
    file.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(file)


def test_an_empty_answer_of_parts_is_empty_and_half_a_character_is_named(read: Read, tmp_path: Path) -> None:
    parts = [{"role": "assistant", "content": content} for content in ([], [{"type": "text", "text": ""}])]
    found = read(lines(tmp_path, *({"messages": [ASKED, part]} for part in parts), CHAT))
    assert len(found.documents) == 1
    assert len(found.bad) == 2
    found = read(lines(tmp_path, {"question": "q", "answer": "\ud83d b"}))
    assert [bad.reason for bad in found.bad] == ["it has half of a surrogate pair, which is no character"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("plain.csv", b"prompt,completion\nIs it lit?, Yes.\n", ""),
        ("mark.csv", "\ufeffprompt,completion\nIs it lit?, Yes.\n".encode(), ""),
        ("semicolon.csv", b"prompt;completion\nIs it lit?; Yes.\n", "semicolons"),
        ("tab.tsv", b"prompt\tcompletion\nIs it lit?\t Yes.\n", "tabs"),
        ("utf16.csv", "prompt,completion\r\nIs it lit?, Yes.\r\n".encode("utf-16"), "UTF-16"),
        ("quoted.csv", b'prompt,"completion"\n"Is it lit?"," Yes."\n', ""),
        ("Capitals.CSV", b"Prompt, Completion\nIs it lit?, Yes.\n", ""),
    ],
)
def test_csv_is_read_with_its_separator_and_encoding(
    read: Read, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    same(found, "<s>Is it lit?⟦ Yes.</s>⟧")
    assert told in " ".join(found.told)
    assert bool(found.told) == bool(told)


def test_every_value_of_a_csv_is_text_and_none_vanishes(read: Read, tmp_path: Path) -> None:
    labels = ["None", "NA", "null", "N/A", "nan", "NaN", "True", "007", "1e3", "-"]
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"Label: ,{label}\n" for label in labels), encoding="utf-8"
    )
    assert [text.strip() for text in read(tmp_path / "rows.csv").learned()] == [f"{label}</s>" for label in labels]


def test_a_csv_row_with_a_line_break_or_too_many_fields_has_its_own_line_number(read: Read, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        'prompt,completion\n"two\nlines",yes\nHi,there,you\n\nHi,yes\n', encoding="utf-8"
    )
    found = read(tmp_path / "rows.csv")
    assert len(found.documents) == 2
    assert [(bad.place, bad.reason) for bad in found.bad] == [
        ("rows.csv, line 4", "it has 3 fields, and the first line names 2")
    ]


def test_a_quote_that_nobody_closes_is_named_and_swallows_nothing_silently(read: Read, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,completion\nHi,yes\n"open,no\nHi,yes\n', encoding="utf-8")
    found = read(tmp_path / "rows.csv")
    assert len(found.documents) == 1
    assert [(bad.place, bad.wrong) for bad in found.bad] == [("rows.csv, line 3", True)]


def test_a_column_that_is_there_twice_is_refused_whatever_the_file(read: Read, tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.csv").write_text("question,answer,answer\na,b,c\n", encoding="utf-8")
    for name in ("rows.parquet", "rows.arrow", "rows.csv"):
        with pytest.raises(InputError, match="the column 'answer' is there twice"):
            read(tmp_path / name)


def test_another_encoding_is_told_how_to_set_and_then_read(read: Read, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("prompt,completion\nCafé?, Oui.\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"rows\.csv: not UTF-8") as caught:
        read(tmp_path / "rows.csv")
    assert "FT_DATASET_ENCODING" in caught.value.hint
    assert read(tmp_path / "rows.csv", encoding="cp1252").texts() == ["<s>Café? Oui.</s>"]
    lines = {"rows.csv": "prompt,completion\nHi,yes\n", "rows.txt": "one\n\ntwo\n", "rows.jsonl": '{"text": "one"}\n'}
    for name, text in lines.items():
        (tmp_path / name).write_text(text, encoding="cp1252")
        with pytest.raises(InputError, match=f"{name}: not UTF-16"):  # without its first mark
            read(tmp_path / name, encoding="utf-16")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert read(tmp_path / "rows.jsonl").bad[0].place == "rows.jsonl, line 2"


def test_text_files_have_paragraphs_or_lines_and_say_which(read: Read, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n", encoding="utf-8")
    (tmp_path / "paragraphs.txt").write_text("One\nand more.\n\n\nTwo.\n", encoding="utf-8")
    found = read(tmp_path / "lines.txt")
    assert (found.texts(), found.told) == (["<s>One.</s>", "<s>Two.</s>"], ["lines.txt: each line is a row."])
    assert read(tmp_path / "paragraphs.txt").texts() == ["<s>One\nand more.</s>", "<s>Two.</s>"]


def test_a_broken_line_is_named_by_file_and_line(read: Read, tmp_path: Path) -> None:
    found = read(lines(tmp_path, CHAT, "", CHAT, '{"messages": [{"role": "user",'))
    same(Found("", found.documents, tokenizer=found.tokenizer), LIT, LIT)
    assert [(bad.place, bad.wrong) for bad in found.bad] == [("rows.jsonl, line 4", True)]
    assert "it is not JSON" in found.bad[0].reason
    (tmp_path / "rows.json").write_text(json.dumps(_TWO)[:-20], encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.json, row 2: not JSON"):
        read(tmp_path / "rows.json")


def test_nesting_that_would_break_the_parser_is_a_bad_row(read: Read, tmp_path: Path) -> None:
    found = read(lines(tmp_path, CHAT, '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"))
    assert found.bad[0].reason == "it is nested too deeply"


def test_files_that_are_not_what_their_names_say_are_refused_by_name(read: Read, tmp_path: Path) -> None:
    for name, told in (
        ("a.parquet", "Parquet"),
        ("a.arrow", "Arrow"),
        ("a.jsonl.gz", "unpacked as .gz"),
        ("a.jsonl.zst", "unpacked as .zst"),
        ("a.jsonl.bz2", "unpacked as .bz2"),
    ):
        (tmp_path / name).write_bytes(b"something else, surely")
        with pytest.raises(InputError, match=f"{name}.*{told}"):
            read(tmp_path / name)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(_TEXT.encode() * 500)[:-30])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz"):
        read(tmp_path / "cut.jsonl.gz")


def test_a_column_that_is_null_until_late_and_rows_of_other_shapes_are_read(read: Read, tmp_path: Path) -> None:
    file = lines(
        tmp_path, *[{**CHAT, "note": None}] * 1200, {**CHAT, "note": "text"}, {"messages": [ASKED, ANSWERED], "other": {"deep": [1]}}
    )  # fmt: skip
    found = read(file)
    assert len(found.documents) == 1202
    assert found.bad == []


def test_columns_and_roles_can_be_named(read: Read, tmp_path: Path) -> None:
    file = lines(tmp_path, {"ask": "Is it lit?", "reply": "Yes."})
    with pytest.raises(InputError, match=r"The dataset's columns \(ask, reply\)") as caught:
        read(file)
    assert (
        'FT_DATASET_COLUMNS to say what they are, such as {"question": "ask", "answer": "reply"}' in caught.value.hint
    )
    assert "TEXT_FIELD" not in caught.value.hint  # which would train on half of each row
    same(read(file, columns={"question": "ask", "answer": "reply"}), LIT)
    only = lines(tmp_path, {"body": "A document."})
    with pytest.raises(InputError) as caught:
        read(only)
    assert "FT_DATASET_TEXT_FIELD=body" in caught.value.hint
