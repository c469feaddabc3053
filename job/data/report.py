"""What was made of a dataset: counts, reasons, samples, and whether anybody would want to train on that."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from job.data.engine import Bad, Encoded
from job.data.masking import IGNORED
from job.errors import InputError

_SHOWN_PER_REASON = 5
_FIRST_SAMPLES, _OTHER_SAMPLES = 4, 4
_LONGEST_SAMPLE = 1200  # tokens shown
_LEAST_LEARNED, _MOST_CUT, _LEAST_ENDED = 0.01, 0.5, 0.5
_AFTER_THE_END = 2  # tokens of a turn after the one that ends it


@dataclass
class Reason:
    """Why rows were left out, how many, and the first of them."""

    text: str
    count: int = 0
    rows: list[Bad] = field(default_factory=list)


@dataclass
class SplitReport:
    """The figures of one split, added up batch by batch. Memory does not grow with the tokens."""

    name: str
    bos_id: int | None
    eos_id: int
    end_ids: frozenset[int]
    blank_ids: frozenset[int] = frozenset()  # tokens that may follow an end within the same turn
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    original_lengths: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    cut: int = 0
    too_long: int = 0
    split: int = 0
    nothing_left: int = 0
    not_wanted: int = 0
    conversations: int = 0
    bad: int = 0
    wrong: Bad | None = None
    reasons: dict[str, Reason] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)
    bos: Counter[int] = field(default_factory=Counter)
    eos: Counter[int] = field(default_factory=Counter)
    double_bos: int = 0
    ends_learned: int = 0  # documents that teach an end
    ends: Counter[int] = field(default_factory=Counter)
    within: Counter[int] = field(default_factory=Counter)  # the same tokens where an answer goes on
    most_id: int = -1
    duplicates: int = 0
    hashes: list[np.ndarray[Any, Any]] = field(default_factory=list)
    samples: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    _random: Random = field(default_factory=lambda: Random(0))

    def count(self, encoded: Encoded) -> None:
        """What became of the rows of a batch."""
        self.rows += encoded.rows
        self.cut += encoded.cut
        self.too_long += encoded.too_long
        self.split += encoded.split
        self.nothing_left += encoded.nothing_left
        self.not_wanted += encoded.not_wanted
        self.conversations += encoded.conversations
        self.longest = max([self.longest, *encoded.full_lengths])
        self.original_lengths.update(encoded.full_lengths)
        for text, number in encoded.told.items():
            self.told[text] += number
        for bad in encoded.bad:
            self.bad += 1
            self.wrong = self.wrong or (bad if bad.wrong else None)
            reason = self.reasons.setdefault(re.sub(r"\d+", "#", bad.reason)[:200], Reason(bad.reason))
            reason.count += 1
            if len(reason.rows) < _SHOWN_PER_REASON:
                reason.rows.append(bad)

    def fresh(self, encoded: Encoded, *, drop: bool) -> np.ndarray[Any, Any]:
        """Which documents of a batch are to be kept: all, or with `drop` those that were not there before."""
        keep = np.ones(len(encoded.lengths), bool)
        for index, value in enumerate(encoded.hashes.tolist()):
            if value in self._seen:
                self.duplicates += 1
                keep[index] = not drop
            else:
                self._seen.add(value)
        return keep

    def add(self, ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> None:
        """Documents that are kept, one after another; `starts` are their offsets, and the end of the last one."""
        lengths = np.diff(starts)
        if not len(lengths):
            return
        self.tokens += len(ids)
        self.most_id = max(self.most_id, int(ids.max()))
        target = learned.copy()
        target[starts[:-1]] = False  # nothing predicts a first token
        self.learned += int(target.sum())
        self.lengths.update(lengths.tolist())
        for counter, token in ((self.bos, self.bos_id), (self.eos, self.eos_id)):
            if token is not None:
                found = np.add.reduceat((ids == token).astype(np.int64), starts[:-1])
                counter.update(
                    dict(zip(*(part.tolist() for part in np.unique(found, return_counts=True)), strict=True))
                )
        if self.bos_id is not None:
            first, second = starts[:-1], np.minimum(starts[:-1] + 1, starts[1:] - 1)
            self.double_bos += int(
                ((ids[first] == self.bos_id) & (ids[second] == self.bos_id) & (second > first)).sum()
            )
        self._count_ends(ids, target, starts)
        for index in range(len(lengths)):
            place = self._place()
            if place is not None:
                part = slice(starts[index], min(starts[index + 1], starts[index] + _LONGEST_SAMPLE))
                self.samples[place : place + 1] = [(ids[part].copy(), learned[part].copy())]

    def _count_ends(
        self, ids: np.ndarray[Any, Any], target: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]
    ) -> None:
        """By which token each document's last learned stretch ends. Blanks may follow it, as in ChatML.

        A token that also occurs within answers ends a part of them, such as their reasoning, and no answer.
        """
        first = starts[:-1]
        goes_on = np.append(target[1:], False)
        goes_on[starts[1:] - 1] = False
        lasts = np.flatnonzero(target & ~goes_on)  # where each stretch ends
        opens = np.append(False, target[:-1])
        opens[first] = False
        begins = np.flatnonzero(target & ~opens)
        owner = np.searchsorted(starts, lasts, side="right") - 1
        known, blank = np.fromiter(self.end_ids, np.int32), np.fromiter(self.blank_ids, np.int32)
        is_known = np.isin(ids, known) & target
        ended, place = np.full(len(lasts), -1, np.int64), np.full(len(lasts), -1, np.int64)
        searched = np.ones(len(lasts), bool)
        for back in range(_AFTER_THE_END + 1):
            at = np.maximum(lasts - back, begins)
            found = searched & is_known[at]
            ended[found], place[found] = ids[at][found], at[found]
            searched &= ~found & np.isin(ids[at], blank)
        # Everything is learned where a stretch begins with its document: then answers end anywhere within it
        whole = begins <= first[owner] + 1
        has_end = np.logical_or.reduceat(is_known, first)
        self.ends_learned += len(np.unique(owner[(ended >= 0) | (whole & has_end[owner])]))
        is_last = np.append(owner[1:] != owner[:-1], True) & (ended >= 0)
        tokens, counts = np.unique(ended[is_last], return_counts=True)
        self.ends.update(dict(zip(tokens.tolist(), counts.tolist(), strict=True)))
        is_known[place[place >= 0]] = False
        inner = np.flatnonzero(is_known)
        inner = inner[~whole[np.searchsorted(begins, inner, side="right") - 1]] if len(inner) else inner
        tokens, counts = np.unique(ids[inner], return_counts=True)
        self.within.update(dict(zip(tokens.tolist(), counts.tolist(), strict=True)))

    def _place(self) -> int | None:
        """Where among the samples the next document belongs: the first ones, and of all others some with equal chances.

        Vitter 1985, "Random sampling with a reservoir", algorithm R.
        """
        self.documents += 1
        if self.documents <= _FIRST_SAMPLES + _OTHER_SAMPLES:
            return self.documents - 1
        place = int(self._random.random() * (self.documents - _FIRST_SAMPLES))
        return _FIRST_SAMPLES + place if place < _OTHER_SAMPLES else None

    # -- what may not be trained on -----------------------------------------------------------------------------------

    def refuse_bad_rows(self, mode: str, most: float, format_name: str) -> None:
        """Raise InputError if more rows are bad than FT_BAD_ROWS and FT_MAX_BAD_ROWS allow."""
        if not self.bad:
            return
        first = next(iter(self.reasons.values())).rows[0]
        if mode == "fail":
            raise InputError(f"{first.place}: {first.reason}.", "Repair the row, or set FT_BAD_ROWS=drop.")
        if self.wrong is not None and mode == "auto":
            raise InputError(
                f"{self.wrong.place}: {self.wrong.reason}.",
                _advice(self.wrong.reason) + "Repair the row, or set FT_BAD_ROWS=drop to leave such rows out.",
            )
        allowed = most if most >= 1 else max(most * self.rows, 1.0 if mode == "drop" and most > 0 else 0.0)
        if self.bad > allowed or self.bad == self.rows:
            worst = sorted(self.reasons.values(), key=lambda reason: -reason.count)
            listed = "".join(
                f"\n  - {reason.count:,} × {reason.text} (first: {reason.rows[0].place}: {reason.rows[0].preview[:80]})"
                for reason in worst[:5]
            )
            raise InputError(
                f"{self.bad:,} of {self.rows:,} {self.name} rows cannot be used as {format_name}:{listed}",
                _advice(worst[0].text)
                + "Repair the rows, set FT_DATASET_FORMAT or FT_DATASET_COLUMNS to what they are, or allow more with FT_MAX_BAD_ROWS.",
            )

    def refuse_nonsense(self, *, max_length: int, too_long: str, vocabulary: int | None, chat: bool) -> None:
        """Raise InputError for data that no training can be meant by."""
        hint = "Look at the report of the data, and set FT_TRAIN_ON, FT_CHAT_TEMPLATE or FT_MAX_SEQ_LENGTH."
        if not self.documents or not self.learned:
            raise InputError(
                f"No {self.name} row has any token left to learn: {self.nothing_left:,} of {self.rows:,} rows have prompts "
                f"that alone fill {max_length} tokens, {self.too_long:,} were dropped for their length, {self.bad:,} cannot be used.",
                "Raise FT_MAX_SEQ_LENGTH, or set FT_TOO_LONG=cut_left or split.",
            )
        if vocabulary is not None and self.most_id >= vocabulary:
            raise InputError(
                f"The tokenizer gives the token {self.most_id}, and the model has embeddings for {vocabulary} only.",
                "Use the tokenizer that belongs to the model, without added tokens.",
            )
        if self.learned < _LEAST_LEARNED * self.tokens:
            raise InputError(
                f"Only {self.learned:,} of {self.tokens:,} {self.name} tokens would be learned, which is less than 1%.",
                hint,
            )
        if too_long == "auto" and self.cut > _MOST_CUT * (self.documents + self.nothing_left):
            raise InputError(
                f"{self.cut:,} of {self.documents + self.nothing_left:,} {self.name} rows are longer than {max_length} tokens and would be cut.",
                "Raise FT_MAX_SEQ_LENGTH, or set FT_TOO_LONG to split, drop, cut_left, or cut if that is meant.",
            )
        if self.double_bos:
            raise InputError(
                f"{self.double_bos:,} {self.name} rows begin with two begin-of-sequence tokens.",
                "Remove the token from the rows or from the chat template: both add one.",
            )
        whole = self.documents - self.cut - self.split
        if chat and whole > 0 and self.ends_learned < _LEAST_ENDED * whole:
            few = (
                f"Only {self.ends_learned:,} of {whole:,} {self.name} rows teach"
                if self.ends_learned
                else f"No {self.name} row teaches"
            )
            raise InputError(
                f"{few} the end of a turn, so the model would never stop.",
                "Set FT_CHAT_TEMPLATE to a template that ends each answer with the tokenizer's end token.",
            )

    # -- for people and other stages ---------------------------------------------------------------------------------

    def as_json(self, tokenizer: Any, format_name: str, trained_on: str) -> dict[str, Any]:
        """The report's part about this split."""
        return {
            "lengths": {str(length): count for length, count in sorted(self.lengths.items())},
            "original_lengths": {str(length): count for length, count in sorted(self.original_lengths.items())},
            "format": format_name,
            "trained_on": trained_on,
            "rows_read": self.rows,
            "rows": self.documents,
            "malformed_rows": self.bad,
            "unlearnable_rows": self.nothing_left,
            "rows_not_wanted": self.not_wanted,
            "truncated_rows": self.cut,
            "split_rows": self.split,
            "rows_dropped_for_length": self.too_long,
            "duplicates": self.duplicates,
            "tokens": self.tokens,
            "learned_tokens": self.learned,
            "longest_row": self.longest,
            "bos_per_row": {str(number): count for number, count in sorted(self.bos.items())},
            "eos_per_row": {str(number): count for number, count in sorted(self.eos.items())},
            "end_tokens": {
                str(token): count for token, count in self.ends.most_common() if self.within[token] < count / 20
            },
            "told": dict(self.told),
            "reasons": [
                {
                    "reason": reason.text,
                    "rows": reason.count,
                    "first": [
                        {"place": bad.place, "reason": bad.reason, "preview": bad.preview} for bad in reason.rows
                    ],
                }
                for reason in sorted(self.reasons.values(), key=lambda reason: -reason.count)
            ],
            "first_row": self._first(tokenizer),
            "samples": [_tokens(tokenizer, ids, learned) for ids, learned in self.samples],
        }

    def _first(self, tokenizer: Any) -> dict[str, str]:
        """The first row as text: all of it, and the part that is learned."""
        ids, learned = self.samples[0]
        return {"text": tokenizer.decode(ids), "learned": tokenizer.decode(ids[learned])}

    def hash_set(self) -> set[int]:
        return self._seen


def _tokens(tokenizer: Any, ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any]) -> list[list[Any]]:
    """[text, id, learned] of each token. Bytes that make a letter only together are shown together."""
    found: list[list[Any]] = []
    for token, is_learned in zip(ids.tolist(), learned.tolist(), strict=True):
        found.append([_shown(tokenizer.convert_ids_to_tokens(token), tokenizer, token), token, bool(is_learned)])
    return found


def _shown(piece: str | None, tokenizer: Any, token: int) -> str:
    """A token as people read it, with its blanks."""
    text = str(piece)
    if text == "<0x0A>":
        return "\n"
    if "▁" in text:
        return text.replace("▁", " ")
    return text if text.startswith("<") else str(tokenizer.decode([token]))


def _advice(reason: str) -> str:
    """What may be meant by rows that fail alike."""
    if (found := re.search(r"has the role '([^']*)'", reason)) is not None:
        from difflib import get_close_matches

        from job.data.conversations import ROLES

        near = get_close_matches(found[1].lower(), ROLES, n=1, cutoff=0.5)
        meant = ROLES[near[0]] if near else "user"
        return f'Set FT_DATASET_ROLES={{"{found[1]}": "{meant}"}} if that is what the role means. '
    if (left_out := re.search(r"leaves out (?:the key '(\w+)'|the (reasoning_content|name) of)", reason)) is not None:
        key = left_out[1] or left_out[2]
        return f"Set FT_CHAT_TEMPLATE to a template that has it, or FT_IGNORED_MESSAGE_KEYS={key} to train without it. "
    if re.search(r"leaves out (the tools|the tool_calls|arguments)", reason):
        return "Set FT_CHAT_TEMPLATE to a template that has tools. "
    if "ystem" in reason:
        return "Set FT_SYSTEM_ROLE=fold to put system prompts before the user's first message. "
    return ""


def overlap(train: SplitReport, evaluation: SplitReport) -> int:
    """Rows of the evaluation data that are training data too, token by token."""
    return len(train.hash_set() & evaluation.hash_set())


def learned_ends(file: Path) -> list[int]:
    """The tokens by which most answers of the training data end, from its report. None where that does not say."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8")).get("train", {}).get("end_tokens", {})
    return [int(token) for token, count in found.items() if count >= sum(found.values()) / 4]


def labels_of(ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(learned, ids, np.int32(IGNORED))


def lines(report: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """The report in a few lines for the terminal: (level, text)."""
    found: list[tuple[str, str]] = []
    for name in names:
        part = report[name]
        share = part["learned_tokens"] / max(1, part["tokens"])
        packed = f", packed into {part['packed_rows']:,} rows" if "packed_rows" in part else ""
        found.append(
            (
                "info",
                f"{name}: {part['rows']:,} rows as {part['format']}, {part['tokens']:,} tokens, "
                f"{part['learned_tokens']:,} learned ({share:.0%}){packed}",
            )
        )
        limit = report["max_length"]
        if part["truncated_rows"]:
            found.append(
                ("warning", f"{part['truncated_rows']:,} {name} rows are longer than {limit} tokens and were cut.")
            )
        if part["split_rows"]:
            found.append(("info", f"{part['split_rows']:,} {name} rows are longer than {limit} tokens and were split."))
        if part["rows_dropped_for_length"]:
            dropped = part["rows_dropped_for_length"]
            found.append(("warning", f"{dropped:,} {name} rows are longer than {limit} tokens and were dropped."))
        if part["unlearnable_rows"]:
            unlearnable = part["unlearnable_rows"]
            found.append(
                ("warning", f"{unlearnable:,} {name} rows have prompts that fill {limit} tokens, and were left out.")
            )
        if part["malformed_rows"]:
            first = part["reasons"][0]
            found.append(
                (
                    "warning",
                    f"{part['malformed_rows']:,} malformed {name} rows were left out. Most: {first['reason']} ({first['rows']:,}; first: {first['first'][0]['place']}).",
                )
            )
        if part["rows_not_wanted"]:
            found.append(
                (
                    "info",
                    f"{part['rows_not_wanted']:,} {name} rows were left out, as FT_DATASET_FORMAT={part['format']} says.",
                )
            )
        if part["duplicates"]:
            what = (
                "were left out"
                if report["deduplicated"]
                else "are there more than once (FT_DEDUPLICATE=true removes them)"
            )
            found.append(("info", f"{part['duplicates']:,} {name} rows are copies of others, and {what}."))
        found += [
            ("info", f"{name}: {text}." + (f" ({count:,} ×)" if count > 1 else ""))
            for text, count in part["told"].items()
        ]
    if report.get("overlap"):
        found.append(
            (
                "warning",
                f"{report['overlap']:,} evaluation rows are also training rows, so the evaluation loss is too low.",
            )
        )
    return found
