"""A tokenizer as GGUF has it (github.com/ggml-org/ggml, docs/gguf.md): tokens, their kinds, and scores or merges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from job.errors import InputError

_UNMERGED = -1e9


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model in the order of their ids, as bytes of UTF-8.

    `kind` is llama (SentencePiece: `scores` decide what is joined) or gpt2 (byte pairs: `merges` do, after the text was
    split as `splits` says).
    """

    kind: str
    tokens: list[str]
    types: list[TokenType]
    scores: list[float] | None = None
    merges: list[str] | None = None
    splits: str | None = None
    space_before: bool = False

    @classmethod
    def of(cls, folder: Path, size: int) -> Vocabulary:
        """The vocabulary in a folder's tokenizer.json, filled up to `size`. Raises InputError if llama.cpp has none like it."""
        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        model = raw["model"]
        if model.get("type") != "BPE":
            raise InputError(
                f"FT_EXPORT: the tokenizer is of the kind {model.get('type')}, which is not written to GGUF files.",
                "Leave the gguf formats out of FT_EXPORT: only byte-pair tokenizers are.",
            )
        ids: dict[int, str] = {number: token for token, number in model["vocab"].items()}
        types = dict.fromkeys(ids, TokenType.NORMAL)
        for added in raw.get("added_tokens", ()):
            ids[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        for number in range(max(size, max(ids) + 1)):
            if number not in ids:
                ids[number], types[number] = f"[UNUSED{number}]", TokenType.UNUSED
        tokens = [ids[number] for number in range(len(ids))]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if not model.get("byte_fallback"):
            return cls(
                "gpt2", tokens, [types[number] for number in range(len(ids))], merges=merges, splits=_splits(raw)
            )
        for number, token in ids.items():
            if len(token) == 6 and token.startswith("<0x"):
                types[number] = TokenType.BYTE
        if model.get("unk_token") in model["vocab"]:
            types[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
        return cls(
            "llama", tokens, [types[number] for number in range(len(ids))],
            scores=_scores(folder / "tokenizer.model", tokens, merges), space_before=_begins_with_space(raw),
        )  # fmt: skip

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.kind)
        writer.add_token_list([token.encode("utf-8") for token in self.tokens])
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_before)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.splits is not None:
            writer.add_tokenizer_pre(self.splits)


def _scores(file: Path, tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's own scores if its file is there; else the merges' order, which says the same."""
    scores = dict.fromkeys(tokens, _UNMERGED)
    for rank, merge in enumerate(merges):
        joined = merge.replace(" ", "", 1)
        if scores.get(joined) == _UNMERGED:
            scores[joined] = -float(rank)
    if file.is_file():
        model = SentencePieceProcessor(model_file=str(file))
        scores |= {model.id_to_piece(number): model.get_score(number) for number in range(model.get_piece_size())}
    return [scores[token] for token in tokens]


def _parts(node: Any) -> list[dict[str, Any]]:
    if not isinstance(node, dict):
        return []
    inner = node.get("pretokenizers") or node.get("normalizers")
    return [part for child in inner for part in _parts(child)] if inner else [node]


def _begins_with_space(raw: dict[str, Any]) -> bool:
    parts = [*_parts(raw.get("normalizer")), *_parts(raw.get("pre_tokenizer"))]
    return any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("first", "always") for part in parts)


def _splits(raw: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which text is split before byte pairs are joined."""
    parts = _parts(raw.get("pre_tokenizer"))
    patterns = " ".join(str(part.get("pattern", {}).get("Regex", "")) for part in parts if part["type"] == "Split")
    if r"\p{N}{1,3}" in patterns and "(?i:" in patterns:
        return "llama-bpe"
    if r"\p{N}|" in patterns and "(?i:" in patterns:
        return "qwen2"
    own = any(part["type"] == "ByteLevel" and part.get("use_regex", True) for part in parts)
    if own and any(part["type"] == "Digits" and part.get("individual_digits") for part in parts):
        return "smollm"
    if own and len(parts) == 1:
        return "gpt-2"
    raise InputError(
        "FT_EXPORT: the tokenizer splits text in a way that llama.cpp is not known to have.",
        "Leave the gguf formats out of FT_EXPORT.",
    )
