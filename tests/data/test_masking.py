"""Which tokens are learned and which are not, with one BOS and one EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.data.formats import Example, Malformed
from job.data.masking import IGNORED, Encoding, encode, render_prompt
from job.data.templates import load_tokenizer, set_chat_template

TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A lamp."},
    {"role": "user", "content": "Lit?"},
    {"role": "assistant", "content": "Yes, lit."},
]


@pytest.fixture(params=["llama-2", "chatml"])
def tokenizer(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    tokenizer = load_tokenizer(tiny_model)
    set_chat_template(tokenizer, request.param)
    return tokenizer


def learned(encoding: Encoding, tokenizer: Any) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(encoding.input_ids, encoding.labels, strict=True))
    return str(tokenizer.decode([label for label in encoding.labels if label != IGNORED]))


def encoded(example: Example, tokenizer: Any, completion_only: bool = True, assistant_only: bool = False) -> Encoding:
    return encode(example, tokenizer, completion_only=completion_only, assistant_only=assistant_only)


def test_text_is_learned_in_full_with_one_bos_and_one_eos(tokenizer: Any) -> None:
    for text in ("The lamp is lit.", "<s>The lamp is lit.</s>"):
        row = encoded(Example(text=text), tokenizer)
        assert row.labels == row.input_ids
        assert (row.input_ids.count(tokenizer.bos_token_id), row.input_ids.count(tokenizer.eos_token_id)) == (1, 1)
        assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_only_the_completion_of_a_prompt_and_completion_is_learned(tokenizer: Any) -> None:
    example = Example(text="Question: lit? Answer:", completion=" Yes.")
    assert learned(encoded(example, tokenizer), tokenizer) == " Yes.</s>"
    assert (
        learned(encoded(example, tokenizer, completion_only=False), tokenizer) == "<s>Question: lit? Answer: Yes.</s>"
    )


def test_a_conversation_is_learned_in_full_by_default(tokenizer: Any) -> None:
    row = encoded(Example(messages=TURNS), tokenizer)
    assert row.labels == row.input_ids


def test_assistant_only_learns_every_answer_with_its_end_and_no_question(tokenizer: Any) -> None:
    row = encoded(Example(messages=TURNS), tokenizer, assistant_only=True)
    text = learned(row, tokenizer)
    plain = text.replace("<|im_end|>", "").replace("\n", "").replace("</s>", "|").replace(" ", "")
    assert plain == "Alamp.|Yes,lit.|"
    assert all(word not in text for word in ("What", "INST", "user"))


def test_a_conversational_completion_is_learned_and_earlier_answers_are_not(tokenizer: Any) -> None:
    text = learned(encoded(Example(messages=TURNS, learned_turns=1), tokenizer), tokenizer)
    assert "Yes, lit." in text
    assert "A lamp." not in text


def test_the_sampling_prompt_is_what_preceded_the_answer_in_training(tokenizer: Any) -> None:
    row = encoded(Example(messages=TURNS[:2]), tokenizer, assistant_only=True)
    prompt = render_prompt(TURNS[0]["content"], tokenizer)
    first_learned = next(index for index, label in enumerate(row.labels) if label != IGNORED)
    assert row.input_ids[:first_learned] == prompt


def test_turns_that_do_not_alternate_are_malformed_for_llama_2(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    set_chat_template(tokenizer, "llama-2")
    with pytest.raises(Malformed, match="alternate"):
        encoded(Example(messages=[TURNS[0], TURNS[2]]), tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused_rather_than_mislabelled(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ messages|length }}{{ m.content }}{% endfor %}"
    with pytest.raises(Malformed, match="cannot be told apart"):
        encoded(Example(messages=TURNS), tokenizer, assistant_only=True)


def test_the_real_llama_2_tokenizer_writes_metas_ids(shared_data: Path, tmp_path: Path) -> None:
    """`<s>[INST]` is 1, 518 (▁[), 25580 (INST), 29962 (]); transformers' own class loses the space when legacy is off."""
    source = shared_data / "models" / "stories15M"
    for change in ("none", "legacy off", "class only"):
        folder = tmp_path / change
        folder.mkdir()
        for file in source.glob("*token*"):
            text = file.read_bytes()
            if file.name == "tokenizer_config.json" and change == "legacy off":
                text = text.replace(b'"legacy": true', b'"legacy": false')
            if not (change == "class only" and file.name == "tokenizer.json"):
                (folder / file.name).write_bytes(text)
        tokenizer = load_tokenizer(folder)
        row = encoded(Example(text="<s>[INST] Hi [/INST] Ho </s>"), tokenizer)
        assert row.input_ids[:4] == [1, 518, 25580, 29962], change
        assert row.input_ids[-1] == 2
