"""Turns examples into token ids, and decides which of them are learned. Nothing else decides that."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from job.data.chat_template import ChatTemplate
from job.data.conversations import Example, Message, Reading, opened, plain
from job.data.files.batch import Malformed
from job.data.words import WordEncoder
from job.errors import InputError, in_a_line
from job.guard.limits import time_limit

IGNORED = -100  # the label that all losses in transformers and trl skip
Span = tuple[int, int]
TrainOn = Literal["all", "assistant", "last"]
_PROMPT_SECONDS = 20.0
_NO_TEXT = re.compile("[\ufdd0-\ufdd3]")  # noncharacters that mark places while a template is rendered


@dataclass(frozen=True)
class Encoding:
    """One row for the model: token ids (int32), and for each whether it is learned."""

    ids: np.ndarray[Any, Any]
    learned: np.ndarray[Any, Any]

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The ids of the learned tokens, and -100 for all others."""
        return np.where(self.learned, self.ids, IGNORED)


@dataclass(frozen=True)
class _Layout:
    """The text of a row, and which characters are learned: all of them if `spans` is None."""

    text: str
    spans: Sequence[Span] | None
    document: bool = False  # begins and ends with what the tokenizer puts around a document


class Encoder:
    """Encodes examples for one tokenizer, one chat template and one choice of what is learned.

    Plain text starts with one BOS, if the tokenizer adds one, and ends with one EOS. A conversation is exactly what the
    chat template renders, because inference uses the same template.

    The learned spans are found in the text by character and mapped to tokens through the tokenizer's offsets. Tokenizing
    prompt and answer separately would split tokens where the full text does not.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        *,
        train_on: TrainOn,
        tool_template: ChatTemplate | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`tool_template` is for conversations with tools, where the tokenizer has one of its own for them."""
        self._template, self._tool_template, self._tell = template, tool_template or template, tell
        self._train_on = train_on
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._words = WordEncoder.of(self._backend)
        adds = self._backend.encode("", add_special_tokens=True).ids
        self._prefix = [token for token in adds if token != self._eos_id or token == self._bos_id][:1]

    @property
    def openings(self) -> frozenset[int]:
        """The tokens with which the tokenizer begins a text."""
        return frozenset([*self._prefix, *([] if self._bos_id is None else [self._bos_id])])

    def encode(self, examples: Sequence[Example]) -> list[Encoding | Malformed]:
        """Encode examples, each to its tokens or to the reason why it cannot be. Other errors are the template's."""
        layouts: list[_Layout | Malformed] = []
        for example in examples:
            try:
                layouts.append(self._lay_out(example))
            except Malformed as reason:
                layouts.append(reason)
        good = [layout for layout in layouts if isinstance(layout, _Layout)]
        encodings = iter(self._tokenize(good))
        return [next(encodings) if isinstance(layout, _Layout) else layout for layout in layouts]

    def one(self, example: Example) -> Encoding:
        """Encode one example. Raises Malformed if it cannot be."""
        found = self.encode([example])[0]
        if isinstance(found, Malformed):
            raise found
        return found

    # -- text and spans ----------------------------------------------------------------------------------------------

    def _lay_out(self, example: Example) -> _Layout:
        if example.messages is not None:
            return self._conversation(example)
        text = example.text or ""
        if _starts_with(text, self._bos):  # as in the default dataset; a second one must not be added
            text = text.lstrip()
        if example.completion is None:
            return _Layout(_without_blanks_after(text, self._eos), None, document=True)
        whole = _without_blanks_after(text + example.completion, self._eos)
        only = self._train_on != "all"
        return _Layout(whole, [(len(text), len(whole))] if only else None, document=True)

    def _conversation(self, example: Example) -> _Layout:
        assert example.messages is not None
        for message in example.messages:
            if _NO_TEXT.search(plain(message.get("content"))):
                raise Malformed("it has noncharacters (U+FDD0 to U+FDD3), which are not text")
        tools = example.tools
        template = (
            self._tool_template if tools or any("tool_calls" in item for item in example.messages) else self._template
        )
        messages = template.suited(example.messages, tools)
        variables = {**example.variables, **({"tools": list(tools)} if tools else {})}
        if self._train_on == "all" and example.learned is None:
            text = template.render(messages, **variables)
            spans = None
        else:
            text, spans = self._learned(template, messages, example, variables)
        template.checked(text, messages, tools, self._tell)
        return _Layout(text, spans)

    def _learned(
        self, template: ChatTemplate, messages: Sequence[Message], example: Example, variables: dict[str, Any]
    ) -> tuple[str, list[Span] | None]:
        """The text, and the spans of the messages that are learned."""
        if self._train_on == "assistant" and example.learned is None:
            text, found = template.marked(messages, variables, apart=False)
            return text, [span for spans in found for span in spans]
        text, found = template.marked(messages, variables)
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        allowed = [example.learned is None or example.learned[index] for index in places]
        if self._train_on == "last":
            allowed = [allow and index == len(places) - 1 for index, allow in enumerate(allowed)]
        chosen = [span for spans, allow in zip(found, allowed, strict=True) if allow for span in spans]
        if self._train_on == "all":  # all but what the row says must not be learned
            left_out = [span for spans, allow in zip(found, allowed, strict=True) if not allow for span in spans]
            chosen = _between(left_out, len(text))
        if not chosen:
            raise Malformed("nothing to learn: the row says so of every answer")
        return text, chosen

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _tokenize(self, layouts: Sequence[_Layout]) -> list[Encoding]:
        if self._words is not None:
            pairs = [self._words.encode(layout.text, layout.spans) for layout in layouts]
        else:
            plain_ones = all(layout.spans is None for layout in layouts)
            batch = self._backend.encode_batch_fast if plain_ones else self._backend.encode_batch
            pairs = [
                _of_backend(found, layout)
                for found, layout in zip(
                    batch([layout.text for layout in layouts], add_special_tokens=False), layouts, strict=True
                )
            ]
        return [
            self._framed(ids, learned, layout.spans is None) if layout.document else Encoding(ids, learned)
            for (ids, learned), layout in zip(pairs, layouts, strict=True)
        ]

    def _framed(self, ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any], everything: bool) -> Encoding:
        """A document between one BOS, if the tokenizer adds one, and one EOS."""
        first = [] if len(ids) and (ids[0] == self._bos_id or [ids[0]] == self._prefix) else self._prefix
        last = [] if len(ids) and ids[-1] == self._eos_id else [self._eos_id]
        if not first and not last:
            return Encoding(ids, learned)
        count = len(ids) + len(first) + len(last)
        whole, marks = np.empty(count, np.int32), np.ones(count, bool)
        inner = slice(len(first), len(first) + len(ids))
        whole[: len(first)], whole[inner], whole[inner.stop :] = first, ids, last
        marks[: len(first)], marks[inner] = everything, learned
        return Encoding(whole, marks)


def _of_backend(found: Any, layout: _Layout) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    ids = np.array(found.ids, np.int32)
    if layout.spans is None:
        return ids, np.ones(len(ids), bool)
    learned = np.zeros(len(ids), bool)
    for first, last in layout.spans:
        begin, end = found.char_to_token(first), found.char_to_token(last - 1)
        if begin is None or end is None:  # a blank that belongs to no token
            offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
            learned |= (offsets[:, 0] < last) & (offsets[:, 1] > first)
            continue
        while end + 1 < len(ids) and found.token_to_chars(end + 1)[0] < last:  # tokens for the bytes of one letter
            end += 1
        learned[begin : end + 1] = True
    return ids, learned


def checked_prompt(prompt: str, tokenizer: Any, reading: Reading | None = None) -> list[int]:
    """The token ids of a prompt of FT_SAMPLE_PROMPTS, in the template that the model was trained with.

    With the system prompt of `reading`. Raises InputError if the model's template fails on it.
    """
    return prompt_ids(_asked(prompt, reading), tokenizer, "a prompt of FT_SAMPLE_PROMPTS")


def prompt_ids(messages: Sequence[Message], tokenizer: Any, what: str = "the conversation") -> list[int]:
    """The token ids of a conversation up to where the answer begins. Raises InputError if the template fails on `what`."""
    try:
        with time_limit(_PROMPT_SECONDS, "rendering a prompt in the model's chat template"):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:  # a template is a program, and the tokenizer's Rust panics with a BaseException
        raise InputError(
            f"The chat template fails on {what}: {in_a_line(error)}", "Set FT_CHAT_TEMPLATE, or change the prompt."
        ) from error


def rendered_prompt(prompt: str, tokenizer: Any, reading: Reading | None = None) -> str:
    """The text of `prompt` as a user message, up to where the answer begins. With the system prompt of `reading`."""
    text: str = tokenizer.apply_chat_template(_asked(prompt, reading), add_generation_prompt=True, tokenize=False)
    return text


def _asked(prompt: str, reading: Reading | None) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": prompt}]
    return messages if reading is None else opened(messages, reading)


def _starts_with(text: str, token: str | None) -> bool:
    return bool(token) and text.lstrip().startswith(str(token))


def _without_blanks_after(text: str, token: str) -> str:
    return text.rstrip() if text.rstrip().endswith(token) else text


def _between(spans: Sequence[Span], length: int) -> list[Span]:
    """What lies outside of some spans."""
    edges = [0, *(edge for span in sorted(spans) for edge in span), length]
    return [(first, last) for first, last in zip(edges[0::2], edges[1::2], strict=True) if last > first]
