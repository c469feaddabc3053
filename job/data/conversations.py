"""The many ways to write down a conversation, as the one that chat templates take.

What a row says is never dropped without a word: keys that change what a message means are kept for the template, and the
template is held to them (rendering.py). Only what means nothing to a model, such as an id, is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from job.data.files.batch import Malformed, Row

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user", "usr": "user", "instruction": "user", "customer": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool", "tool_result": "tool",
    "developer": "developer",
    "function_call": "call", "tool_call": "call", "function-call": "call",
}  # fmt: skip
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
_LEARN_KEYS = ("weight", "train", "trainable", "training", "loss")
_MEANS_NOTHING = frozenset(
    ("id", "index", "message_id", "timestamp", "created_at", "create_time", "updated_at", "language", "lang", "model", "annotations", "logprobs", "token_count", "tokens", "html", "markdown", "turn_identifier", "hashed_ip", "country", "state", "header", "redacted", "toxic", "openai_moderation", "detoxify_moderation", "status_code", "usage", "finish_reason", "metadata")
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One row: plain `text`, a prompt in `text` with its `completion`, or a conversation in `messages`.

    `learned` says of each message whether the row allows to learn it, or is None where it says nothing. `tools` and
    `variables` are for the chat template.
    """

    text: str | None = None
    completion: str | None = None
    messages: Sequence[Message] | None = None
    learned: Sequence[bool] | None = None
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Reading:
    """How rows are read: settings, and what is to be told once, by its words."""

    text_field: str = "text"
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    system_role: str = "keep"
    ignored_keys: frozenset[str] = frozenset()
    completion_only: bool = True  # of rows with a prompt and a completion
    answers_only: bool = True  # of other rows in which earlier turns belong to the question
    told: dict[str, int] = field(default_factory=dict)

    @property
    def ignores_reasoning(self) -> bool:
        """Whether FT_IGNORED_MESSAGE_KEYS names the reasoning, by any of its names: then no form of it is trained on."""
        return not self.ignored_keys.isdisjoint(REASONING_KEYS)

    def tell(self, text: str) -> None:
        self.told[text] = self.told.get(text, 0) + 1


def conversation(row: Row, turns: Any, reading: Reading, *, system: Any = None, learned_from: int = 0) -> Example:
    """A row whose conversation is `turns`, in any of the known layouts. Raises Malformed with the turn that is wrong.

    Turns before `learned_from` are not learned. `system` is the text of a column for it.
    """
    items = as_json(turns)
    if isinstance(items, Mapping):
        items = [items]
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise Malformed("there are no messages")
    if all(isinstance(item, str) for item in items):  # LIMA: texts of the user and the assistant by turns
        items = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(items)]
    elif all(isinstance(item, Mapping) and {"input", "output"} <= item.keys() for item in items):  # Capybara: pairs
        items = [
            {"role": role, "content": pair[key]}
            for pair in items
            for role, key in (("user", "input"), ("assistant", "output"))
        ]
    messages: list[Message] = []
    learned: list[bool] = []
    for number, item in enumerate(items, 1):
        message, learn = _message(item, number, reading)
        messages.append(message)
        learned.append(learn and number > learned_from)
    tools = _tools(row)
    text = system if isinstance(system, str) and system.strip() else None
    _place_system(messages, learned, text, reading)
    if not any(message["role"] == "assistant" for message in messages):
        raise Malformed("nothing to learn: no message is the assistant's")
    limited = learned_from > 0 or not all(learned)
    variables = as_json(row.get("chat_template_kwargs"))
    return Example(
        messages=messages,
        learned=learned if limited else None,
        tools=tools,
        variables=variables if isinstance(variables, Mapping) else {},
    )


def as_json(value: Any) -> Any:
    """What a text of JSON holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def as_turns(value: Any) -> Any:
    """The messages that a text of JSON holds. Anything else as it is: many a text is JSON without being messages."""
    found = as_json(value)
    if not isinstance(value, str) or not isinstance(found, list) or not found:
        return value
    are_turns = all(isinstance(item, Mapping) and any(key in item for key in _ROLE_KEYS) for item in found)
    return found if are_turns else value


def is_missing(value: Any) -> bool:
    """Whether a number is none, as pandas writes a missing text."""
    return isinstance(value, float) and math.isnan(value)


def _message(item: Any, number: int, reading: Reading) -> tuple[Message, bool]:
    if not isinstance(item, Mapping):
        raise Malformed(f"message {number} is not an object with a role and a content")
    role_key = next((key for key in _ROLE_KEYS if isinstance(item.get(key), str)), None)
    if role_key is None:
        raise Malformed(f"message {number} has no role")
    role = _role(item[role_key], number, reading)
    content_key = next((key for key in _CONTENT_KEYS if key in item), None)
    content = item[content_key] if content_key is not None else None
    message: Message = {"role": role}
    reasoning, calls = None, None
    learn = True
    for key, value in item.items():
        if key in (role_key, content_key) or value is None or value == [] or value == {} or value == "":
            continue
        if key in REASONING_KEYS and reading.ignores_reasoning:
            continue
        if key in _LEARN_KEYS:
            learn = learn and _weight(key, value, number)
        elif key in reading.ignored_keys:
            continue
        elif key in REASONING_KEYS:
            reasoning = _text(value, number, key)
        elif key == "tool_calls":
            calls = _calls(value, number)
        elif key == "function_call":
            calls = _calls([value], number)
        elif key == "refusal":
            content = content or value
        elif key == "prefix" and value is False:
            continue
        elif key in ("name", "tool_call_id") or key not in _MEANS_NOTHING:
            message[key] = value
    content, thought = _content(content, number, reading)
    reasoning = reasoning or thought
    if role == "assistant" and reading.ignores_reasoning:
        reasoning = None
        if isinstance(content, str) and content.lstrip().startswith("<think>") and "</think>" in content:
            content = content.partition("</think>")[2].lstrip()
    if role == "call":
        role, message["role"], calls, content = "assistant", "assistant", _calls(as_json(content), number), None
    is_text = isinstance(content, str | list)
    if is_text and not plain(content).strip() and role == "assistant" and not calls and learn:
        raise Malformed(f"message {number}, the assistant's, is empty")
    if content is None and not calls:
        raise Malformed(f"message {number} ({role}) has no content")
    message["content"] = content
    if reasoning is not None and role == "assistant":
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message, learn


def _role(text: str, number: int, reading: Reading) -> str:
    plain = text.strip().lower()
    known = reading.roles.get(text) or reading.roles.get(plain) or ROLES.get(plain)
    if known is None:
        raise Malformed(f"message {number} has the role {text[:40]!r}, which is none of the known ones")
    if known != text and known != "call":
        reading.tell(f"the role {text[:40]!r} is read as {known}")
    return known


def _weight(key: str, value: Any, number: int) -> bool:
    """Whether a message is learned. OpenAI allows the weights 0 and 1."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"):
        value = value.strip().lower() in ("true", "1")
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise Malformed(f"message {number} has {key} {value!r}: only 0 and 1, or false and true, are possible")


def _content(value: Any, number: int, reading: Reading) -> tuple[Any, str | None]:
    """The text of a message, and the reasoning that stands among its parts. Lists of text parts stay lists."""
    if value is None or isinstance(value, str):
        return value, None
    if isinstance(value, Malformed):
        raise value
    if is_missing(value):
        return None, None
    if isinstance(value, bool | int | float):
        reading.tell("numbers as contents are read as text")
        return json.dumps(value), None
    if isinstance(value, Mapping) and "parts" in value:  # the export of ChatGPT
        value = value["parts"]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence):
        raise Malformed(f"message {number} has a content that is not text")
    parts, thought = [], []
    for part in value:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("thinking", "reasoning") and isinstance(part.get(kind, part.get("text")), str):
            thought.append(part.get(kind, part.get("text")))
        else:
            raise Malformed(f"message {number} has a part of type {kind!r}; only text can be trained on")
    return parts, "".join(thought) or None


def _text(value: Any, number: int, key: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"message {number} has a {key} that is not text")
    return value


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with their arguments as an object where they are one."""
    value = as_json(value)
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and not isinstance(function.get("name"), str):
            function = None
        if function is None:
            raise Malformed(f"message {number} has a tool call without a name")
        arguments = as_json(function.get("arguments", function.get("parameters", {})))
        kept = {key: part for key, part in call.items() if key in ("id", "type") and part is not None}
        found.append({"type": "function"} | kept | {"function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(row: Row) -> Sequence[Any] | None:
    """The tools that a row offers, each in OpenAI's form."""
    for key in ("tools", "functions"):
        value = as_json(row.get(key))
        if isinstance(value, str) and value.strip():
            raise Malformed(f"the column {key} is not JSON")
        if isinstance(value, Sequence) and value and not isinstance(value, str):
            items = [as_json(item) for item in value]
            return [
                {"type": "function", "function": item} if isinstance(item, Mapping) and "function" not in item and "name" in item else item
                for item in items
            ]  # fmt: skip
    return None


def opened(messages: Sequence[Message], reading: Reading) -> list[Message]:
    """A conversation as a row that begins with it would be trained on: with FT_SYSTEM_PROMPT where FT_SYSTEM_ROLE says."""
    found, learned = list(messages), [True] * len(messages)
    _place_system(found, learned, None, reading)
    return found


def _place_system(messages: list[Message], learned: list[bool], text: str | None, reading: Reading) -> None:
    """Add the system prompt of the row or of FT_SYSTEM_PROMPT where there is none, then keep, fold or drop it."""
    has_one = messages[0]["role"] in ("system", "developer")
    is_replaced = text is not None or reading.system_prompt is not None or reading.system_role != "keep"
    if has_one and len(messages) > 1 and is_replaced and not plain(messages[0]["content"]).strip():
        del messages[0], learned[0]  # otherwise it stays: a blank one switches off a template's own
        has_one = False
    if text is not None and has_one and plain(messages[0]["content"]).strip() != text.strip():
        reading.tell("the column of system prompts is not used where the messages begin with another one")
    if text is None and not has_one:
        text = reading.system_prompt
    if text is not None and not has_one:
        messages.insert(0, {"role": "system", "content": text})
        learned.insert(0, True)
        has_one = True
    if not has_one or reading.system_role == "keep":
        return
    first = messages.pop(0)
    learned.pop(0)
    if reading.system_role == "drop":
        reading.tell("system prompts are left out, as FT_SYSTEM_ROLE=drop says")
        return
    user = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if user is None:
        raise Malformed("there is no message of the user that the system prompt could be put before")
    reading.tell("system prompts are put before the first message of the user, as FT_SYSTEM_ROLE=fold says")
    message = messages[user]
    messages[user] = message | {"content": f"{plain(first['content'])}\n\n{plain(message['content'])}"}


def plain(content: Any) -> str:
    """A content as one text."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
