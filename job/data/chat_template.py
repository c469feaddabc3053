"""Which characters of a rendered conversation the assistant wrote.

They are found by the first of these that is exact: the template's own `{% generation %}` marks; those of TRL's
training variant of it; the difference between renderings with and without a turn; renderings in which the assistant's
words are replaced by words that occur nowhere else. A conversation for which none is exact is malformed, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from job.data.conversations import Message, plain
from job.data.files.batch import Malformed
from job.data.rendering import BEGIN, END, Span, Template, question, unmarked

_SENTINEL = re.compile("\ufdd2(\\d+)\ufdd3")
_PIECES = re.compile(f"([{BEGIN}{END}]|\ufdd2\\d+\ufdd3)")
_BROKEN_MARK = re.compile(r"[<\[][^<>\[\]]*$")
_WHOLE_PREFIXES = 12  # messages up to which every prefix is rendered; beyond, only the turns around each answer are


class ChatTemplate(Template):
    """A chat template of a tokenizer, for training: `render` for the text, `marked` for the assistant's part of it."""

    def __init__(self, text: str, special_tokens: Mapping[str, Any], training: str | None = None) -> None:
        """`training` is a variant of the template that has marks. Raises InputError if one cannot be compiled."""
        super().__init__(text, special_tokens, training)
        self._prompts: dict[tuple[Any, ...], str] = {}

    def marked(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, apart: bool = True
    ) -> tuple[str, list[list[Span]]]:
        """The text of a conversation, and for each of the assistant's messages the characters that it wrote.

        Without `apart`, those of all messages may come together, which takes less time. A message's characters end with the end of its turn. Raises Malformed if they cannot be told exactly.
        """
        if self.marks != "turns":
            text, spans = unmarked(self.render_with_marks(messages, variables))
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
                frame = self.render_with_marks(signed, variables)
            except Malformed:
                continue
            if unmarked(_SENTINEL.sub("", frame)) == (text, spans):
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
        text = self.render([question(), {"role": "assistant", "content": "\ufdd21\ufdd3"}], **variables)
        pieces = _SENTINEL.split(text)
        return pieces[2] if len(pieces) == 3 else None

    def _prompt(self, variables: Mapping[str, Any]) -> str:
        """What the template writes before an answer, in training as in use."""
        asked = [question()]
        before, prompted = self.render(asked, **variables), self.render(asked, **variables, add_generation_prompt=True)
        answered = self.render([*asked, {"role": "assistant", "content": "\ufdd21\ufdd3"}], **variables)
        if not prompted.startswith(before) or not answered.startswith(before):
            return ""
        return _common_start(prompted, answered)[len(before) :]


def _common_start(first: str, second: str) -> str:
    """What two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    end = next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))
    return first[:end]


def _previous(messages: Sequence[Message], index: int) -> int:
    """The index behind the assistant's last message before `index`."""
    return next((other + 1 for other in range(index - 1, -1, -1) if messages[other]["role"] == "assistant"), 0)


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
        if piece == BEGIN:
            begin, inside, before = position, set(), last
        elif piece == END and begin is not None:
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
