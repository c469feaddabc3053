"""Turns an example into token ids and labels. This is the only place that decides which tokens are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from job.data.formats import Example, Malformed

IGNORED = -100  # the label that all losses in transformers and trl skip
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoding:
    """One row for the model. `labels[i]` is `input_ids[i]` if the token is learned, else -100."""

    input_ids: list[int]
    labels: list[int]


def encode(example: Example, tokenizer: Any, *, completion_only: bool, assistant_only: bool) -> Encoding:
    """Tokenize and label one example.

    Plain text starts with one BOS (if the tokenizer has one) and ends with EOS. A conversation is exactly what the chat
    template renders, because inference uses the same template.

    The learned spans are found in the text by character and mapped to tokens through the tokenizer's offsets.
    Tokenizing prompt and answer separately would split tokens where the full text does not.
    """
    if example.messages is None:
        assert example.text is not None
        text = _with_eos(example.text + (example.completion or ""), tokenizer)
        only_completion = example.completion is not None and completion_only
        spans = [(len(example.text), len(text))] if only_completion else [(0, len(text))]
        # Text that already starts with BOS, as in the default dataset, must not get a second one.
        has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return _encode_spans(text, spans, tokenizer, add_special_tokens=not has_bos)
    try:
        text, spans = _render(example, tokenizer, completion_only=completion_only, assistant_only=assistant_only)
    except TemplateError as error:
        raise Malformed(str(error)) from error
    return _encode_spans(text, spans, tokenizer, add_special_tokens=False)


def render_prompt(prompt: str, tokenizer: Any) -> list[int]:
    """The token ids of `prompt` as a user message, in the template that the model was trained with."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _render(example: Example, tokenizer: Any, *, completion_only: bool, assistant_only: bool) -> tuple[str, list[Span]]:
    messages = list(example.messages or ())
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if example.learned_turns is not None and completion_only:
        learned: Sequence[int] = range(len(messages) - example.learned_turns, len(messages))
    elif assistant_only:
        learned = range(len(messages))
    else:
        return text, [(0, len(text))]
    spans = []
    for index in learned:
        if messages[index]["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, tokenize=False)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise Malformed(
                "the chat template renders earlier turns differently when later ones follow, so turns cannot be told apart"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _encode_spans(text: str, spans: Sequence[Span], tokenizer: Any, *, add_special_tokens: bool) -> Encoding:
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    everything = list(spans) == [(0, len(text))]
    labels = [
        token if everything or any(start < span_end and end > span_start for span_start, span_end in spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Encoding(ids, labels)


def _with_eos(text: str, tokenizer: Any) -> str:
    return text if text.rstrip().endswith(tokenizer.eos_token) else text + str(tokenizer.eos_token)
