"""Chat templates: what they make of a conversation, and which characters of it the assistant wrote.

The marks are found by the first of these that is exact: the template's own `{% generation %}` marks; those of TRL's
training variant of it; the difference between renderings with and without a turn; renderings in which the assistant's
words are replaced by words that occur nowhere else. A conversation for which none is exact is malformed, never guessed.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters, which no text may hold (Unicode 16.0, 23.7)
_SENTINEL = re.compile("\ufdd2(\\d+)\ufdd3")
_PIECES = re.compile(f"([{_BEGIN}{_END}]|\ufdd2\\d+\ufdd3)")
_BROKEN_MARK = re.compile(r"[<\[][^<>\[\]]*$")
_WHOLE_PREFIXES = 12  # messages up to which every prefix is rendered; beyond, only the turns around each answer are
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
        return f"{_BEGIN}{caller()}{_END}"


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


class ChatTemplate:
    """A chat template of a tokenizer, for training: `render` for the text, `marked` for the assistant's part of it."""

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
        self._prompts: dict[tuple[Any, ...], str] = {}
        self.marks = "generation marks" if marked == text else "training variant" if marked is not None else "turns"
        self.dated = "strftime_now" in text

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The text of a conversation. Raises Malformed with the template's reason if it does not take it."""
        text = self._render(self._template, messages, variables)
        return _unmarked(text)[0] if _BEGIN in text else text

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
        for trial in ([{"role": "user", "content": parts}], [_asked(), {"role": "assistant", "content": parts}]):
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
                    text = _unmarked(self._render(self._marked or self._template, [_asked(), message], {}))[0]
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

    # -- the assistant's part ----------------------------------------------------------------------------------------

    def marked(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, apart: bool = True
    ) -> tuple[str, list[list[Span]]]:
        """The text of a conversation, and for each of the assistant's messages the characters that it wrote.

        Without `apart`, those of all messages may come together, which takes less time. A message's characters end with the end of its turn. Raises Malformed if they cannot be told exactly.
        """
        if self._marked is not None:
            text, spans = _unmarked(self._render(self._marked, messages, variables))
            if not spans:
                raise Malformed("the chat template marks nothing as the assistant's")
            return text, self._by_message(text, spans, messages, variables) if apart else [spans]
        text = self.render(messages, **variables)
        found = self._by_turns(text, messages, variables) or self._by_sentinels(text, messages, variables)
        if found is None:
            raise Malformed(
                "the chat template renders earlier turns differently when later ones follow, so turns cannot be told apart"
            )
        return text, [[span] for span in found]

    def _by_message(
        self, text: str, spans: list[Span], messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> list[list[Span]]:
        """Give each of the assistant's messages its marked spans, by a rendering in which every message is signed.

        A template may mark the end of a turn, the reasoning and the answer apart, and in other turns leave one out. So
        their number says nothing. Without the signatures the rendering must be that of the messages themselves.
        """
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(places) == 1:
            return [spans]
        for blank in (True, False):
            signed = [_signed(index, message, blank=blank) for index, message in enumerate(messages)]
            try:
                frame = self._render(self._marked, signed, variables)
            except Malformed:
                continue
            if _unmarked(_SENTINEL.sub("", frame)) == (text, spans):
                break
        else:
            raise Malformed("the chat template depends on contents so that its marks cannot be told apart by message")
        found: dict[int, list[Span]] = {index: [] for index in places}
        for span, index in zip(spans, _owners(frame, set(places)), strict=True):
            found[index].append(span)
        return [found[index] for index in places]

    def _by_turns(self, text: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[Span] | None:
        """Spans from what each answer adds to the text before it; None if what is added does not add up to the text.

        In a long conversation only the first exchange and the current one are rendered, which takes time that grows
        with its length rather than with the square of it. Adding up is the proof that nothing else mattered.
        """
        spans, position, after = [], 0, ""
        first = next((index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"), 0)
        start = 0
        for index, message in enumerate(messages):
            if message["role"] == "user" and (index == 0 or messages[index - 1]["role"] != "user"):
                start = index
            if message["role"] != "assistant":
                continue
            whole = len(messages) <= _WHOLE_PREFIXES or start <= first
            head = [] if whole else list(messages[:first])
            begin = 0 if whole else start
            earlier = _previous(messages, index)
            try:
                known = after if whole else self.render([*head, *messages[begin:earlier]], **variables)
                asked = [*head, *messages[begin:index]]
                before = self.render(asked, **variables) if asked else ""
                is_last = whole and index == len(messages) - 1
                after = text if is_last else self.render([*asked, message], **variables)
                prompt = self._prompt_after(asked, before, variables)
            except Malformed:
                return None
            if not (after.startswith(before) and before.startswith(known)):
                return None
            added = after[len(known) :]
            if not text.startswith(added, position):
                return None
            lead = len(before) - len(known) + len(_common_start(after[len(before) : len(before) + len(prompt)], prompt))
            spans.append((position + lead, position + len(added)))
            position += len(added)
        rest = text[position:]
        if messages[-1]["role"] == "assistant" and rest:
            return None
        return spans

    def _prompt_after(self, asked: Sequence[Message], before: str, variables: Mapping[str, Any]) -> str:
        """What the template writes to ask for an answer, which depends on who spoke last and on the row's variables."""
        if not asked:
            return self._prompt_at_first(variables)
        own = sorted((name, repr(value)) for name, value in variables.items() if name != "tools")
        key = (asked[-1]["role"], "tools" in variables, *own)
        if key not in self._prompts:
            prompted = self.render(asked, **variables, add_generation_prompt=True)
            self._prompts[key] = prompted[len(before) :] if prompted.startswith(before) else ""
        return self._prompts[key]

    def _prompt_at_first(self, variables: Mapping[str, Any]) -> str:
        """What stands before an answer with which a conversation begins."""
        answer = {"role": "assistant", "content": "\ufdd21\ufdd3"}
        first, prompt = _SENTINEL.split(self.render([answer], **variables))[0], self._prompt(variables)
        found = first.rfind(prompt) if prompt else -1
        return first[: found + len(prompt)] if found >= 0 else ""

    def _by_sentinels(self, text: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[Span] | None:
        """Spans from a rendering in which each answer is replaced by a word that occurs nowhere else."""
        places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        replaced = [
            {**message, "content": f"\ufdd2{index}\ufdd3"} if index in places else message
            for index, message in enumerate(messages)
        ]
        try:
            frame = self.render(replaced, **variables)
            closing = self._closing(variables)
            prompt = self._prompt(variables)
        except Malformed:
            return None
        pieces = _SENTINEL.split(frame)
        if [int(number) for number in pieces[1::2]] != places or closing is None:
            return None
        fixed, position, spans = pieces[0::2], 0, []
        for number, index in enumerate(places):
            if not text.startswith(fixed[number], position):
                return None
            lead = fixed[number].rfind(prompt) if prompt else -1
            begin = position + (lead + len(prompt) if lead >= 0 else len(fixed[number]))
            position += len(fixed[number])
            content = next(
                (
                    form
                    for form in _forms(messages[index]["content"])
                    if text.startswith(form + fixed[number + 1], position)
                ),
                None,
            )
            if content is None:
                return None
            position += len(content)
            end = _common_start(closing, fixed[number + 1])
            if end not in (closing, fixed[number + 1]):  # within the mark that begins the next turn
                end = _BROKEN_MARK.sub("", end)
            if not end.strip():
                return None  # no end of the turn that could be learned
            spans.append((begin, position + len(end)))
        return spans if text[position:] == fixed[-1] else None

    def _closing(self, variables: Mapping[str, Any]) -> str | None:
        """What the template writes after the last answer."""
        text = self.render([_asked(), {"role": "assistant", "content": "\ufdd21\ufdd3"}], **variables)
        pieces = _SENTINEL.split(text)
        return pieces[2] if len(pieces) == 3 else None

    def _prompt(self, variables: Mapping[str, Any]) -> str:
        """What the template writes before an answer, in training as in use."""
        asked = [_asked()]
        before, prompted = self.render(asked, **variables), self.render(asked, **variables, add_generation_prompt=True)
        answered = self.render([*asked, {"role": "assistant", "content": "\ufdd21\ufdd3"}], **variables)
        if not prompted.startswith(before) or not answered.startswith(before):
            return ""
        return _common_start(prompted, answered)[len(before) :]


_KNOWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS}


def _common_start(first: str, second: str) -> str:
    """What two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    end = next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
    return first[:end]


def _previous(messages: Sequence[Message], index: int) -> int:
    """The index behind the assistant's last message before `index`."""
    return next((other + 1 for other in range(index - 1, -1, -1) if messages[other]["role"] == "assistant"), 0)


def _asked() -> Message:
    return {"role": "user", "content": "What is it?"}


def _with_arguments(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    if as_text and not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def _signed(index: int, message: Message, *, blank: bool) -> Message:
    """The message with a word at its end that occurs nowhere else, before blanks that a template may cut off.

    Some templates leave out a content that is blank: one beside calls is not signed, nor any other unless `blank`.
    """
    mark = f"\ufdd2{index}\ufdd3"

    def sign(text: str) -> str:
        end = len(text.rstrip())
        return text[:end] + mark + text[end:]

    signed, content = dict(message), message.get("content")
    if isinstance(content, str) and (content.strip() or (blank and not message.get("tool_calls"))):
        signed["content"] = sign(content)
    elif isinstance(content, list) and content:
        signed["content"] = [*content[:-1], {**content[-1], "text": sign(content[-1]["text"])}]
    if calls := message.get("tool_calls"):
        function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + mark}
        signed["tool_calls"] = [*calls[:-1], {**calls[-1], "function": function}]
    return signed


def _owners(frame: str, assistants: set[int]) -> Iterator[int]:
    """Whose message each mark of a rendering of signed messages is.

    That which signed within it. A mark without a signature belongs to the assistant's message right before or right after
    it. Raises Malformed if both or neither of them are the assistant's.
    """
    marks: list[set[int]] = []  # the signatures within each
    around: list[tuple[int | None, int | None]] = []  # the last signature before each, and the first one after it
    inside: set[int] = set()
    last: int | None = None
    before: int | None = None
    begin: int | None = None
    position = 0
    for piece in _PIECES.split(frame):
        if piece == _BEGIN:
            begin, inside, before = position, set(), last
        elif piece == _END and begin is not None:
            if position > begin:
                marks.append(inside)
                around.append((before, None))
            begin = None
        elif signature := _SENTINEL.fullmatch(piece):
            last = int(signature[1])
            if begin is not None:
                inside.add(last)
            around = [(one, last if other is None else other) for one, other in around]
        else:
            position += len(piece)
    for inside, neighbours in zip(marks, around, strict=True):
        owners = inside or assistants & set(neighbours)
        if len(owners) != 1 or not owners <= assistants:
            raise Malformed("the chat template's marks cannot be told apart by message")
        yield from owners


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans between them. Neighbouring marks of one turn stay apart."""
    plain_text, spans, begin, position = [], [], 0, 0
    for piece in re.split(f"([{_BEGIN}{_END}])", text):
        if piece == _BEGIN:
            begin = position
        elif piece == _END:
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


def _forms(content: Any) -> list[str]:
    """An answer as a template may write it: whole, without blanks at its ends, without its reasoning."""
    text = plain(content)
    answer = text.rpartition("</think>")[2]
    return list(
        dict.fromkeys(
            form
            for base in (text, answer)
            for form in (base, base.strip(), base.lstrip(), base.rstrip(), base.lstrip("\n"))
        )
    )
