"""A fast tokenizer from a SentencePiece file (`tokenizer.model`) that encodes exactly as SentencePiece does.

transformers' own conversion orders merges by the length of their parts where their scores are equal in rank, so that
indented code, among others, is split into other tokens than the model was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

_PROBES = (
    "[INST] A question? [/INST] An answer.", "def f(x):\n    if x:\n        return  1\n\n\n\ty = 3", "   three blanks",
    "naïve 漢字 🙂 \u200b ﬁ ½ Ⅳ", "a      b        c         d", "",
)  # fmt: skip


def convert(file: Path) -> Tokenizer | None:
    """A tokenizer for a byte-pair model with byte fallback, as Llama's; None if the file holds another kind of model."""
    model = SentencePieceProcessor(model_file=str(file))
    size = model.get_piece_size()
    pieces = [model.id_to_piece(index) for index in range(size)]
    if not any(model.is_byte(index) for index in range(size)):
        return None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    plain = [
        index
        for index in range(size)
        if not (model.is_byte(index) or model.is_control(index) or model.is_unknown(index) or model.is_unused(index))
    ]
    merges = _merges(pieces, plain, vocabulary, model)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=pieces[model.unk_id()], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    special = [index for index in range(size) if model.is_control(index) or model.is_unknown(index)]
    tokenizer.add_special_tokens([AddedToken(pieces[index], normalized=False, special=True) for index in special])
    return tokenizer if agrees(tokenizer, model) else None


def agrees(tokenizer: Tokenizer, model: SentencePieceProcessor) -> bool:
    """Whether a tokenizer encodes texts of many kinds as SentencePiece does."""
    return all(
        tokenizer.encode(text, add_special_tokens=False).ids == (model.encode(text) if text else []) for text in _PROBES
    )


def _merges(pieces: list[str], plain: list[int], vocabulary: dict[str, int], model: Any) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which SentencePiece would merge them: by score."""
    usable = {pieces[index] for index in plain}
    found: list[tuple[float, int, int, str, str]] = []
    for index in plain:
        piece, score = pieces[index], model.get_score(index)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
