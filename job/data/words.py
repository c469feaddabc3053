"""Encodes text word by word, exactly as a SentencePiece-like tokenizer does, from a memory of the words seen before.

Such a tokenizer, as Llama 2's, looks for pairs to merge in the whole text at once. Where no piece of its vocabulary has
something before a blank, no merge ever crosses the beginning of a word, so that words can be encoded one at a time, and
each only once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

_BLANK = "▁"
_WORDS = re.compile(f"{_BLANK}+[^{_BLANK}]*|[^{_BLANK}]+")
_WORD_START = re.compile(f"(?<!{_BLANK}){_BLANK}")
_LONGEST_KEPT, _MOST_KEPT = 48, 100_000
_PREPEND = {"type": "Prepend", "prepend": _BLANK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
Spans = Sequence[tuple[int, int]]


class WordEncoder:
    """The ids of texts, and which of them lie in given spans. `of` tells whether a tokenizer can be used this way."""

    def __init__(self, raw: Tokenizer, added: dict[str, int]) -> None:
        self._raw, self._added = raw, added
        self._known: dict[str, list[int]] = {}
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if added else None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordEncoder | None:
        """An encoder that gives the same ids as `tokenizer` for every text, or None if that is not certain."""
        spec = json.loads(tokenizer.to_str())
        model, normalizer = spec["model"], spec["normalizer"] or {}
        certain = (
            model["type"] == "BPE"
            and model.get("byte_fallback")
            and not model.get("dropout")
            and not model.get("ignore_merges")
            and not model.get("continuing_subword_prefix")
            and not model.get("end_of_word_suffix")
            and spec["pre_tokenizer"] is None
            and normalizer.get("normalizers") == [_PREPEND, _REPLACE]
            and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
            and not any(
                token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]
                for token in spec["added_tokens"]
            )
            and not any(_crosses("".join(_pair(merge))) for merge in model["merges"])
        )
        if not certain:
            return None
        raw = Tokenizer.from_str(
            json.dumps({**spec, "normalizer": None, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
        )  # fmt: skip
        return cls(raw, {token["content"]: token["id"] for token in spec["added_tokens"]})

    def encode(self, text: str, spans: Spans | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Token ids (int32), and for each whether it overlaps a span (all do if `spans` is None)."""
        ids: list[int] = []
        waiting = [] if spans is None else [edge for span in spans for edge in span]
        marks: list[int] = []
        position = 0
        for number, piece in enumerate(self._split.split(text) if self._split is not None else [text]):
            end = position + len(piece)
            while len(marks) < len(waiting) and waiting[len(marks)] <= position:
                marks.append(len(ids))
            if number % 2:
                while len(marks) < len(waiting) and waiting[len(marks)] < end:  # inside of a special token
                    marks.append(len(ids) + len(marks) % 2)
                ids.append(self._added[piece])
            elif piece:
                edges = []
                for edge in waiting[len(marks) :]:
                    if edge >= end:
                        break
                    edges.append(edge - position)
                self._segment(_BLANK + piece.replace(" ", _BLANK), edges, ids, marks)
            position = end
        while len(marks) < len(waiting):
            marks.append(len(ids))
        found = np.array(ids, np.int32)
        if spans is None:
            return found, np.ones(len(found), bool)
        learned = np.zeros(len(found), bool)
        for first, last in zip(marks[0::2], marks[1::2], strict=True):
            learned[first:last] = True
        return found, learned

    def _segment(self, text: str, edges: list[int], ids: list[int], marks: list[int]) -> None:
        """Encode text that begins with an added blank. Edges are positions in it without that blank."""
        done = 0
        for edge in edges:
            place = edge + 1
            if place <= done:  # within the word that the edge before lay in
                self._within(text, done, place, ids, marks)
                continue
            begin = _start_of_word(text, place)
            self._words(text[done:begin], ids)
            done = max(done, begin)
            if begin == place:
                marks.append(len(ids))
                continue
            following = _WORD_START.search(text, place + 1 if text[place : place + 1] == _BLANK else place)
            last = following.start() if following is not None else len(text)
            self._word_start = (begin, len(ids))
            self._words(text[begin:last], ids)
            done = last
            self._within(text, done, place, ids, marks)
        self._words(text[done:], ids)

    def _within(self, text: str, done: int, place: int, ids: list[int], marks: list[int]) -> None:
        """Mark the token of the word before `done` at which a span begins, or behind which it ends."""
        begin, first = self._word_start
        offsets = self._raw.encode(text[begin:done], add_special_tokens=False).offsets
        if len(marks) % 2:
            marks.append(first + sum(start + begin < place for start, _ in offsets))
        else:
            marks.append(first + sum(end + begin <= place for _, end in offsets))

    def _words(self, text: str, ids: list[int]) -> None:
        known = self._known
        for word in _WORDS.findall(text):
            try:
                ids += known[word]
            except KeyError:
                found = self._raw.encode(word, add_special_tokens=False).ids
                if len(word) <= _LONGEST_KEPT:
                    if len(known) >= _MOST_KEPT:
                        known.clear()
                    known[word] = found
                ids += found


def _start_of_word(text: str, place: int) -> int:
    """Where the word that holds the character at `place` begins: at the first of the blanks before it."""
    if place >= len(text):
        return len(text)
    begin = place if text[place] == _BLANK else text.rfind(_BLANK, 0, place)
    while begin > 0 and text[begin - 1] == _BLANK:
        begin -= 1
    return max(begin, 0)


def _crosses(piece: str) -> bool:
    """Whether a piece has a blank behind something that is none."""
    return _BLANK in piece.lstrip(_BLANK)


def _pair(merge: Any) -> list[str]:
    return merge if isinstance(merge, list) else merge.split(" ", 1)
