"""Chat templates: what they make of a conversation, and what they can take of it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from job.data.conversations import REASONING_KEYS, Message, plain
from job.data.files.batch import LeftOut, Malformed
from job.errors import InputError, in_a_line

Span = tuple[int, int]

# A template that prints today's date would give other tokens tomorrow. This is the date in Meta's own template of Llama 3.1.
PINNED_DATE = datetime.datetime(2024, 7, 26)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BEGIN, END = "\ufdd0", "\ufdd1"  # noncharacters, which no text may hold (Unicode 16.0, 23.7)
_MOST_CHARACTERS, _MOST_PIECES = 16 << 20, 1 << 20
_KWARGS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Generation(Extension):
    """Puts a mark at each end of `{% generation %}…{% endgeneration %}`."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates (transformers, utils/chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = PINNED_DATE.strftime
    return environment


def _bounded(pieces: Iterable[str]) -> str:
    """The pieces together. Raises Malformed if a template writes more than any row may have."""
    kept: list[str] = []
    size = 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size > _MOST_CHARACTERS or len(kept) > _MOST_PIECES:
            raise Malformed(f"the chat template writes more than {_MOST_CHARACTERS:,} characters")
    return "".join(kept)


def has_marks(text: str) -> bool:
    """Whether a template says itself what the assistant writes."""
    return _GENERATION.search(text) is not None


class Template:
    """A chat template: the text of conversations, in the forms that it takes, and whether it leaves anything out."""

    def __init__(self, text: str, special_tokens: Mapping[str, Any], training: str | None = None) -> None:
        """`training` is a variant of the template that has marks. Raises InputError if one cannot be compiled."""
        self.text, self._tokens = text, {name: special_tokens[name] for name in _KWARGS if special_tokens.get(name)}
        environment = _environment()
        marked = text if has_marks(text) else training
        try:
            self._template = environment.from_string(text)
            self._marked = environment.from_string(marked) if marked is not None else None
        except (TemplateError, RecursionError) as error:
            raise InputError(
                f"The chat template cannot be read: {in_a_line(error)}",
                "Set FT_CHAT_TEMPLATE to a file with another one.",
            ) from error
        self._globals = (
            dict(environment.globals)
            | {"tools": None, "documents": None, "add_generation_prompt": False}
            | self._tokens
        )
        self.marks = "generation marks" if marked == text else "training variant" if marked is not None else "turns"
        self.dated = "strftime_now" in text

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises Malformed with the template's reason if it does not take it."""
        text = self._render(self._template, messages, variables)
        return unmarked(text)[0] if BEGIN in text else text

    def render_with_marks(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text with `BEGIN` and `END` around what its marks, or those of its training variant, say.

        Without either there are none. Raises Malformed as `render` does.
        """
        return self._render(self._marked or self._template, messages, variables)

    def _render(self, template: Any, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        try:
            # as Template.render does, without copying all globals each time
            context = template.new_context({**self._globals, "messages": messages, **variables}, shared=True)
            return _bounded(template.root_render_func(context))
        except (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise Malformed(f"the chat template does not take it: {in_a_line(error)}") from error

    # -- what the template can render --------------------------------------------------------------------------------

    def suited(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Message]:
        """The messages in the forms that this template takes: contents, arguments and reasoning differ between them."""
        self._refuse_unknown(messages, tools)
        suited = []
        for message in messages:
            changed = dict(message)
            content = changed.get("content")
            if isinstance(content, list) and not self._takes_parts:
                changed["content"] = plain(content)
            calls = changed.get("tool_calls")
            if calls:
                content, as_text = self._form_of_calls
                if changed.get("content") is None:
                    changed["content"] = content
                changed["tool_calls"] = [_with_arguments(call, as_text=as_text) for call in calls]
            if changed["role"] == "developer" and "developer" not in self.text:
                changed["role"] = "system"
            if "reasoning_content" in changed:
                changed |= dict.fromkeys(REASONING_KEYS[:3], changed["reasoning_content"])
            suited.append(changed)
        return suited

    def _refuse_unknown(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """Raise LeftOut for what this template never mentions, before it fails on that in words of its own."""
        if tools and not self._reads("tools"):
            raise LeftOut("the chat template leaves out the tools")
        for number, message in enumerate(messages, 1):
            if "tool_calls" in message and not self._reads("tool_calls"):
                raise LeftOut(f"the chat template leaves out the tool_calls of message {number} ({message['role']})")
            if "reasoning_content" in message and not any(map(self._reads, REASONING_KEYS)):
                raise LeftOut(
                    f"the chat template leaves out the reasoning_content of message {number} ({message['role']})"
                )

    @cached_property
    def _takes_parts(self) -> bool:
        parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
        for trial in ([{"role": "user", "content": parts}], [question(), {"role": "assistant", "content": parts}]):
            try:
                text = self.render(trial)
            except Malformed:
                return False
            if "first" not in text or "second" not in text or "'type'" in text or '"type"' in text:
                return False
        return True

    @cached_property
    def _form_of_calls(self) -> tuple[str | None, bool]:
        """The content beside a call, and whether arguments are a text, with which this template shows the call in full."""
        for content in (None, ""):
            for as_text in (False, True):
                call = _with_arguments(
                    {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "lamp"}}},
                    as_text=as_text,
                )  # fmt: skip
                message = {"role": "assistant", "content": content, "tool_calls": [call]}
                try:
                    text = unmarked(self.render_with_marks([question(), message], {}))[0]
                except Malformed:
                    continue
                written_out = "{'" in text or '\\"' in text or re.search(r"\bNone\b", text) is not None
                if "look_up" in text and "lamp" in text and not written_out:
                    return content, as_text
        return None, False

    def checked(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, tell: Callable[[str], None]
    ) -> None:
        """Raise LeftOut if the text lacks something that the messages say: a template leaves out what it does not know."""
        position = 0
        last = len(messages) - 1  # an answer before another question is an earlier one
        while last >= 0 and messages[last]["role"] not in ("assistant", "user"):
            last -= 1
        for index, message in enumerate(messages):
            who = f"message {index + 1} ({message['role']})"
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    raise LeftOut(f"the chat template leaves out the tool_calls of {who}")
                for value in _leaves(call["function"]["arguments"]):
                    if value not in text and json.dumps(value, ensure_ascii=False)[1:-1] not in text:
                        raise LeftOut(f"the chat template leaves out arguments of the tool_calls of {who}")
            reasoning = message.get("reasoning_content")
            if reasoning and reasoning.strip() not in text:
                if index == last:
                    raise LeftOut(f"the chat template leaves out the reasoning_content of {who}")
                tell("the chat template leaves out the reasoning of earlier answers")
            name = message.get("name")
            if name and message["role"] in ("user", "assistant", "system") and str(name) not in text:
                raise LeftOut(f"the chat template leaves out the name of {who}")
            for key in message.keys() - _KNOWN_KEYS:
                if not self._reads(key):
                    raise LeftOut(f"the chat template leaves out the key {key!r} of {who}")
            for part in _parts(message.get("content")):
                found = text.find(part, position)
                if found < 0 and "</think>" in part:  # templates that leave out earlier reasoning
                    thought, _, part = part.rpartition("</think>")
                    thought, part = thought.rpartition("<think>")[2].strip(), part.strip()
                    found = text.find(part, position)
                    if thought and thought not in text:
                        if index == last:
                            raise LeftOut(
                                f"the chat template leaves out the reasoning_content of {who}, <think> … </think>"
                            )
                        tell("the chat template leaves out the reasoning of earlier answers")
                if found < 0 and message["role"] in ("system", "developer"):
                    found = position if part in text else -1  # some templates place it before the last question
                elif found >= 0:
                    position = found + len(part)
                if found < 0 and not _is_quoted(part, text):
                    raise LeftOut(f"the chat template leaves out the content of {who}")
        for tool in tools or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
            if str(function.get("name", "")) not in text:
                raise LeftOut("the chat template leaves out the tools")

    def _reads(self, key: str) -> bool:
        return re.search(rf"\b{re.escape(key)}\b", self.text) is not None


_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS}


def question() -> Message:
    return {"role": "user", "content": "What is it?"}


def _with_arguments(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    if as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans between them. Neighbouring marks of one turn stay apart."""
    plain_text, spans, begin, position = [], [], 0, 0
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece == BEGIN:
            begin = position
        elif piece == END:
            spans.append((begin, position))
        else:
            plain_text.append(piece)
            position += len(piece)
    return "".join(plain_text), [span for span in spans if span[1] > span[0]]


def _leaves(value: Any) -> list[str]:
    """The texts within arguments."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return []


def _parts(content: Any) -> list[str]:
    """The texts of a content as they must at least occur: templates may cut off blanks at the ends."""
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    return [stripped for text in texts if (stripped := text.strip())]


def _is_quoted(part: str, text: str) -> bool:
    """Whether a text occurs as JSON writes it, which some templates do with answers of tools."""
    if json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text:
        return True
    try:
        value = json.loads(part)
    except ValueError:
        return False
    return all(leaf in text for leaf in _leaves(value))
