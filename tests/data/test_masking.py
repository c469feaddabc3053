"""The tokens of a row are those of the model's tokenizer, whatever form it comes in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from job.data.conversations import Example, Reading, conversation
from job.data.masking import Encoder, checked_prompt
from job.data.sentencepiece_model import convert
from job.data.templates import LLAMA_2, load_tokenizer, set_chat_template, templates_of
from job.data.words import WordEncoder
from tests.golden import MODEL

TURNS = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A lamp."},
    {"role": "user", "content": "Lit?"},
    {"role": "assistant", "content": "Yes, lit."},
]
CODE = "def f(x):\n    if x:\n        return  1\n\n\n\ty = 3    # naïve 漢字 🙂 ﬁ ½\n  z"


def encoder(tokenizer: Any, train_on: Any = "assistant") -> Encoder:
    return Encoder(tokenizer, templates_of(tokenizer)[0], train_on=train_on)


@pytest.mark.parametrize("template", ["llama-2", "chatml"])
@pytest.mark.parametrize("role", [None, "keep", "fold", "drop"])
def test_the_sampling_prompt_is_what_preceded_the_answer_in_training(
    tokenizer_of: Callable[[str], Any], template: str, role: Any
) -> None:
    tokenizer = tokenizer_of(template)
    reading = Reading() if role is None else Reading(system_prompt="You keep the light.", system_role=role)
    row = encoder(tokenizer).one(conversation({}, TURNS[:2], reading))
    asked = checked_prompt(TURNS[0]["content"], tokenizer, reading)
    assert row.ids[: row.learned.argmax()].tolist() == asked
    assert ("You keep the light." in tokenizer.decode(asked)) == (role in ("keep", "fold"))


@pytest.mark.parametrize("template", ["llama-2", "chatml"])
def test_everything_is_learned_where_that_is_asked(tokenizer_of: Callable[[str], Any], template: str) -> None:
    tokenizer = tokenizer_of(template)
    assert encoder(tokenizer, "all").one(Example(messages=TURNS)).learned.all()
    assert encoder(tokenizer, "all").one(Example(text="Question:", completion=" Yes.")).learned.all()
    row = encoder(tokenizer).one(Example(text="Question:", completion=" Yes."))
    assert tokenizer.decode(row.ids[row.learned]) == " Yes.</s>"
    assert set(row.labels[~row.learned]) == {-100}


# -- Llama 2's tokenizer -----------------------------------------------------------------------------------------------------


def test_the_real_llama_2_tokenizer_writes_metas_ids(shared_data: Path, tmp_path: Path) -> None:
    """Fast, slow, legacy or not, or `tokenizer.model` alone: every row is encoded as by SentencePiece, piece by piece."""
    from sentencepiece import SentencePieceProcessor

    source = shared_data / "models" / "stories15M"
    meta = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    rows = [json.loads(line)["text"] for line in (shared_data / "datasets" / "guanaco_1k_human_assistant.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    texts = [*rows[:400], CODE, *(f"x\n{' ' * count}y" for count in range(1, 40))]
    for change in ("none", "legacy off", "class only", "model only"):
        folder = tmp_path / change
        folder.mkdir()
        for file in source.glob("*token*"):
            data = file.read_bytes()
            if file.name == "tokenizer_config.json" and change == "legacy off":
                data = data.replace(b'"legacy": true', b'"legacy": false')
            if not (change in ("class only", "model only") and file.name == "tokenizer.json"):
                (folder / file.name).write_bytes(data)
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = LLAMA_2
        work = encoder(tokenizer, "all")
        found = work.encode([Example(text=text) for text in texts])
        for text, row in zip(texts, found, strict=True):
            assert row.ids.tolist() == [1, *meta.encode(text), 2], change
        chat = work.one(Example(messages=TURNS))
        pairs = ("[INST] What is it? [/INST] A lamp. ", "[INST] Lit? [/INST] Yes, lit. ")
        assert chat.ids.tolist() == [token for pair in pairs for token in (1, *meta.encode(pair), 2)], change


def test_raw_conversations_become_the_published_rows_to_the_letter(shared_data: Path) -> None:
    """All 997 raw conversations of guanaco are rows of mlabonne/guanaco-llama2-1k."""
    from datasets import load_dataset

    from job.data.conversations import Reading
    from job.data.formats import choose_format

    parquet = next((shared_data / "datasets" / "guanaco-llama2-1k").glob("*.parquet"))
    expected = set(load_dataset("parquet", data_files=str(parquet), split="train")["text"])
    tokenizer = load_tokenizer(shared_data / "models" / "stories15M")
    assert set_chat_template(tokenizer, "llama-2") == "llama-2"
    template, _ = templates_of(tokenizer)
    lines = (shared_data / "datasets" / "guanaco_1k_human_assistant.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    read = choose_format("auto", Reading(), ["text"], rows[:20]).read
    texts = [template.render(read(row, Reading()).messages or ()) for row in rows]
    assert len(texts) == 997
    assert [text for text in texts if text not in expected] == []


def test_a_model_file_without_a_fast_tokenizer_is_converted_exactly(tmp_path: Path) -> None:
    """A model trained here, since Llama's own may not be shipped."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"{CODE}\nThe keeper lights a lamp.    The lamp is lit.\n  indented\n" * 40, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    converted = convert(tmp_path / "tokenizer.model")
    assert converted is not None
    for text in (CODE, "a lamp", " the  lamp", "x" + " " * 17 + "y"):
        assert converted.encode(text, add_special_tokens=False).ids == model.encode(text)


# -- word by word --------------------------------------------------------------------------------------------------------------

PIECES = ["a", " ", "  ", "\n", "▁", "é", "漢", "🙂", "<s>", "</s>", "[INST]", "lamp", " the", "<0x0A>", "\t"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14), st.lists(st.integers(0, 40), max_size=6))
def test_words_encode_as_the_tokenizer_does_and_spans_find_the_same_tokens(pieces: list[str], edges: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    words = WordEncoder.of(tokenizer)
    assert words is not None
    text = "".join(pieces)
    places = sorted({min(edge, len(text)) for edge in edges})[: len(edges) // 2 * 2]
    spans = list(zip(places[0::2], places[1::2], strict=False))
    wanted = tokenizer.encode(text, add_special_tokens=False)
    ids, learned = words.encode(text, spans)
    assert ids.tolist() == wanted.ids
    assert learned.tolist() == [
        any(start < last and end > first for first, last in spans) for start, end in wanted.offsets
    ]


def test_a_tokenizer_whose_pieces_cross_words_is_not_taken_apart(tiny_model: Path, tmp_path: Path) -> None:
    assert WordEncoder.of(load_tokenizer(tiny_model).backend_tokenizer) is None  # bytes, with a splitter of its own
    spec = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["vocab"]["e▁"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].append("e ▁" if isinstance(spec["model"]["merges"][0], str) else ["e", "▁"])
    assert WordEncoder.of(Tokenizer.from_str(json.dumps(spec))) is None


def test_a_tokenizer_that_cannot_be_loaded_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from job.errors import InputError

    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "model")
