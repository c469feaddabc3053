"""A chat template in the words of Ollama's Modelfile, which knows Go's templates and not Jinja's.

What a template puts before and after each message is found out by rendering one, and the parts are then put together for
other conversations and compared with the template's own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_USER, _ASSISTANT, _SYSTEM = "\ue000user\ue000", "\ue000assistant\ue000", "\ue000system\ue000"


@dataclass(frozen=True)
class Turns:
    """What stands before and after the messages of each role. The answer follows what stands after the user's.

    `prelude` stands before the first message if that is the user's: a default system prompt, for one. `first` is the token
    that a conversation begins with, which Ollama writes itself.
    """

    first: str
    prelude: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None

    @classmethod
    def of(cls, tokenizer: Any) -> Turns | None:
        """The parts of a tokenizer's chat template. None if it does not treat messages one after the other."""
        user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}
        try:
            asked = _render(tokenizer, [user])
            whole = _render(tokenizer, [user, assistant, user])
            before, after = asked.split(_USER)
            answered, between, _ = whole.removeprefix(asked).replace(_USER, _ASSISTANT).split(_ASSISTANT)
        except Exception:  # a template is a program, and may leave out a message
            return None
        again = _common_ending(before, between)
        first = tokenizer.bos_token or ""
        found = cls(
            first if first and before.startswith(first) else "",
            before.removesuffix(again), (again, after), (answered, between.removesuffix(again)), _of_system(tokenizer, again),
        )  # fmt: skip
        return found if found._agrees(tokenizer) and not found._breaks_out() else None

    def text(self, messages: list[dict[str, str]]) -> str:
        """The conversation as Ollama renders it, with its first token."""
        parts = [self.prelude] if messages[0]["role"] == "user" else []
        for message in messages:
            named = {"user": self.user, "assistant": self.assistant, "system": self.system or ("", "")}
            before, after = named[message["role"]]
            parts += [before, message["content"], after]
        return "".join(parts)

    def _breaks_out(self) -> bool:
        """Whether a part, which a stranger wrote, would end the Modelfile's quotes or be run by Go's engine."""
        parts = [self.prelude, *self.user, *self.assistant, *(self.system or ())]
        return any(mark in part for part in parts for mark in ('"""', "{{", "}}"))

    def _agrees(self, tokenizer: Any) -> bool:
        """Whether the parts give the template's own text for conversations of several turns."""
        roles = ("user", "assistant") * 2 + ("user",)
        talk = [{"role": role, "content": f"Line {number}?"} for number, role in enumerate(roles)]
        talks = [talk[:1], talk[:3], talk]
        if self.system is not None:
            talks += [[{"role": "system", "content": "Be brief."}, *some] for some in talks]
        return all(self.text(some) == _render(tokenizer, some) for some in talks)


def _common_ending(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _of_system(tokenizer: Any, user: str) -> tuple[str, str] | None:
    """What stands before and after a system prompt. None if the template has no place for one ahead of the user's turn."""
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    try:
        ahead, _ = _render(tokenizer, messages).split(_USER)
        start, end = ahead.split(_SYSTEM)
    except Exception:  # many templates refuse the role
        return None
    return (start, end.removesuffix(user)) if end.endswith(user) else None


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def modelfile(tokenizer: Any, file: str, system: str | None = None, ends: Sequence[int] = ()) -> str:
    """A Modelfile for `ollama create`. Without turns it leaves the template to the one in the GGUF file.

    `system` is the system prompt that conversations began with in training, and `ends` the tokens by which answers ended.
    """
    lines = [f"FROM {file}"]
    turns = Turns.of(tokenizer)
    if turns is not None:
        lines.append(f'TEMPLATE """{_go(turns)}"""')
    stops = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(ends))]
    if turns is not None and (mark := turns.user[0].removeprefix(turns.first).strip()):
        stops.append(mark)
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(filter(None, stops))]
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def _go(turns: Turns) -> str:
    first, prelude, (before, after) = turns.first, turns.prelude.removeprefix(turns.first), turns.user
    if first and not turns.prelude and before.startswith(first):
        before = "{{ if $i }}" + first + "{{ end }}" + before.removeprefix(first)
    elif prelude:
        before = "{{ if not $i }}" + prelude + "{{ end }}" + before
    roles = [("user", before, after), ("assistant", *turns.assistant)]
    if turns.system is not None:
        roles.append(("system", turns.system[0].removeprefix(first), turns.system[1]))
    text = "{{- range $i, $m := .Messages }}"
    for number, (role, ahead, behind) in enumerate(roles):
        word = "else if" if number else "if"
        text += f'{{{{ {word} eq $m.Role "{role}" }}}}{ahead}{{{{ $m.Content }}}}{behind}'
    return text + "{{ end }}{{ end }}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
