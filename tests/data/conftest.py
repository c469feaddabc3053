"""Rows as files, and what the job makes of them, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from job.data.conversations import Reading
from job.data.engine import Bad, Encoded, RowEncoder
from job.data.files import FileOptions, Malformed, Row, read_batches
from job.data.formats import choose_format, renamed
from job.data.masking import Encoder
from job.data.templates import load_tokenizer, set_chat_template, templates_of


@dataclass
class Found:
    """The documents of a file: token ids and which of them are learned; the rows left out; what was told."""

    format: str
    documents: list[tuple[list[int], list[bool]]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    tokenizer: Any = None

    def texts(self) -> list[str]:
        return [self.tokenizer.decode(ids) for ids, _ in self.documents]

    def learned(self) -> list[str]:
        return [
            self.tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
            for ids, marks in self.documents
        ]


@pytest.fixture(scope="session")
def tokenizer_of(tiny_model: Path) -> Callable[[str], Any]:
    """A tokenizer with a chat template, by its name or its text."""

    def load(template: str) -> Any:
        tokenizer = load_tokenizer(tiny_model)
        if "{" in template:
            tokenizer.chat_template = template
        else:
            set_chat_template(tokenizer, template)
        return tokenizer

    return load


@pytest.fixture
def read(tokenizer_of: Callable[[str], Any]) -> Callable[..., Found]:
    """What the job makes of a data file."""

    def make(
        file: Path,
        *,
        template: str = "llama-2",
        train_on: Any = "assistant",
        wanted: str = "auto",
        max_length: int = 512,
        too_long: Any = "cut",
        tokenizer: Any = None,
        encoding: str | None = None,
        separator: str | None = None,
        **reading: Any,
    ) -> Found:
        used = tokenizer if tokenizer is not None else tokenizer_of(template)
        how, told = Reading(**reading), []
        options = FileOptions(encoding, separator, None, told.append)
        batches = list(read_batches(file, file.name, options))
        sample: list[Row] = [
            renamed(row, how.columns) for batch in batches for _, row in batch.rows() if not isinstance(row, Malformed)
        ][:200]
        names = list(dict.fromkeys(name for row in sample for name in row))
        chosen = choose_format(wanted, how, names, sample)
        if chosen.trees:
            from job.data.trees import gathered

            batches = list(gathered(iter(batches)))
        own, for_tools = templates_of(used)
        encoder = Encoder(
            used, own, train_on="all" if chosen.name == "text" else train_on, tool_template=for_tools, tell=how.tell
        )
        work = RowEncoder(chosen, how, encoder, max_length, too_long)
        found = Found(chosen.name, tokenizer=used, told=told)
        told += how.told
        for encoded in map(work, batches):
            _add(found, encoded)
        return found

    return make


def _add(found: Found, encoded: Encoded) -> None:
    start = 0
    for length in encoded.lengths.tolist():
        part = slice(start, start + length)
        found.documents.append((encoded.ids[part].tolist(), encoded.learned[part].tolist()))
        start += length
    found.bad += encoded.bad
    found.told += [text for text in encoded.told if text not in found.told]
    for name in ("cut", "too_long", "split", "nothing_left", "not_wanted", "rows"):
        found.counts[name] = found.counts.get(name, 0) + getattr(encoded, name)


def by_hand(tokenizer: Any, marked: str) -> tuple[list[int], list[bool]]:
    """Token ids and labels of a text in which what is learned stands between ⟦ and ⟧, from the tokenizer's offsets."""
    text, spans, begin = "", [], 0
    for character in marked:
        if character == "⟦":
            begin = len(text)
        elif character == "⟧":
            spans.append((begin, len(text)))
        else:
            text += character
    encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    return encoded.ids, [any(start < last and end > first for first, last in spans) for start, end in encoded.offsets]
