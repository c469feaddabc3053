"""The row formats of datasets, and how each becomes text or a conversation.

To add a format, add a `Format` to `FORMATS` and its name to the choices of FT_DATASET_FORMAT (settings.py).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.data.conversations import ROLES, Example, Reading, as_json, as_turns, conversation, is_missing
from job.data.files.batch import LeftOut, Malformed, Row
from job.errors import InputError

_TURN = re.compile(r"### (Human|Assistant):")
_INSTRUCTION = re.compile(r"\[/?INST\]")
_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """One row format.

    It fits if the dataset has all `columns`, and one of `either` if there are any, and `looks_right` agrees on some rows.
    `read` turns one row into an example. `also` are further columns that it reads. Rows of a `refused` format are not
    trained on unless the format is asked for by name. A format of `trees` reads all rows together.
    """

    name: str
    read: Callable[[Row, Reading], Example]
    columns: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    looks_right: Callable[[Sequence[Row], Reading], bool] = lambda rows, reading: True
    refused: str | None = None
    trees: bool = False
    chat: bool = True

    def needs(self, text_field: str) -> tuple[str, ...]:
        """The columns without which it cannot be read, by their names in this dataset."""
        return tuple(text_field.lower() if name == "text" else name for name in self.columns)

    def uses(self, reading: Reading) -> frozenset[str]:
        """All columns that it may read, in lower case, by their names in the files."""
        names = {*self.needs(reading.text_field), *self.either, *self.also, *_EVERYWHERE}
        return frozenset({*names, *(text.strip().lower() for text in reading.columns.values())})


_EVERYWHERE = ("tools", "functions", "chat_template_kwargs", "system", "system_prompt")
_CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")


def column(row: Row, name: str) -> Any:
    """A row's value in a column, whose name may be written in another case; None if there is none."""
    if name in row:
        return row[name]
    actual = _plain_names(tuple(row)).get(name)
    return row[actual] if actual is not None else None


@functools.lru_cache(maxsize=1000)
def _plain_names(columns: tuple[str, ...]) -> dict[str, str]:
    """Names in lower case and without blanks around them → as they are written. The first of several counts."""
    return {actual.strip().lower(): actual for actual in reversed(columns)}


def _read_text(row: Row, reading: Reading) -> Example:
    return Example(text=_text(row, reading.text_field, reading, may_be_number=False))


def _conversation_of(row: Row) -> Any:
    return next((value for name in _CONVERSATION_COLUMNS if (value := column(row, name)) is not None), None)


def _read_messages(row: Row, reading: Reading) -> Example:
    return conversation(row, _conversation_of(row), reading, system=_system(row))


def _read_prompt_completion(row: Row, reading: Reading) -> Example:
    prompt, completion = as_turns(column(row, "prompt")), as_turns(column(row, "completion"))
    if isinstance(completion, list) and completion:
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return conversation(
            row,
            [*before, *completion],
            reading,
            system=_system(row),
            learned_from=len(before) if reading.completion_only else 0,
        )
    if isinstance(prompt, list) and prompt and isinstance(completion, str):
        turns = [*prompt, {"role": "assistant", "content": completion}]
        return conversation(
            row, turns, reading, system=_system(row), learned_from=len(prompt) if reading.completion_only else 0
        )
    for name in _EVERYWHERE:
        value = as_json(column(row, name))
        if isinstance(value, str | list) and (value.strip() if isinstance(value, str) else value):
            raise LeftOut(
                f"the column {name} has no place beside prompt and completion, which are text. To train on a conversation, "
                'set FT_DATASET_COLUMNS={"question": "prompt", "answer": "completion"}'
            )
    text = _text(row, "prompt", reading, may_be_empty=True)
    return Example(text=text, completion=_text(row, "completion", reading))


def _pair(prompt: str, answer: str, *context: str) -> Callable[[Row, Reading], Example]:
    """A reader of rows with a question, an answer and maybe more that belongs to the question."""

    def read(row: Row, reading: Reading) -> Example:
        asked = as_turns(column(row, prompt))
        if isinstance(asked, list) and asked and isinstance(asked[0], Mapping):
            turns = [*asked, {"role": "assistant", "content": _text(row, answer, reading)}]
            return conversation(
                row, turns, reading, system=_system(row), learned_from=len(asked) if reading.answers_only else 0
            )
        parts = [_text(row, prompt, reading, may_be_empty=bool(context))]
        parts += [_text(row, name, reading, may_be_empty=True) for name in context if column(row, name) is not None]
        question = "\n".join(part for part in parts if part.strip())
        if not question:
            raise Malformed(f"column {prompt} is empty")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, answer, reading)}]
        earlier = [
            {"role": role, "content": text}
            for pair in as_json(column(row, "history")) or ()
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return conversation(row, [*earlier, *turns], reading, system=_system(row))

    return read


# Question, answer, and what belongs to the question. The first pair whose columns are all there is meant.
_PAIRS = (
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("instruction", "answer", "context"),
    ("instruction", "completion", "input"),
    ("prompt", "response", "context"),
    ("prompt", "answer", "context"),
    ("prompt", "output", "input"),
    ("prompt", "chosen_response"),
    ("question", "answer", "context"),
    ("question", "response", "context"),
    ("question", "output", "context"),
    ("query", "response", "context"),
    ("query", "answer", "context"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
    ("input", "response"),
    ("source", "target"),
)  # fmt: skip


def _pair_of(row: Row) -> tuple[str, ...] | None:
    names = {key.strip().lower() for key in row}
    return next((pair for pair in _PAIRS if set(pair[:2]) <= names), None)


def _read_pairs(row: Row, reading: Reading) -> Example:
    pair = _pair_of(row)
    if pair is None:
        raise Malformed("it has no columns for a question and an answer")
    return _pair(*pair)(row, reading)


def _read_human_assistant(row: Row, reading: Reading) -> Example:
    """Turn `### Human: …### Assistant: …`, as in timdettmers/openassistant-guanaco, into a conversation.

    Only the role marks split the text, so headings (`###`) inside an answer survive. An unanswered question at the end
    is dropped.
    """
    pieces = _TURN.split(_text(row, reading.text_field, reading, may_be_number=False))
    turns = [
        {"role": ROLES[role.lower()], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise Malformed("there is no ### Human: … ### Assistant: … pair")
    return conversation(row, turns, reading)


def _read_llama_2(row: Row, reading: Reading) -> Example:
    """Take `<s>[INST] … [/INST] … </s>` apart again, so that another template can be used."""
    turns: list[dict[str, str]] = []
    for document in re.split(r"</s>", _text(row, reading.text_field, reading)):
        pieces = _INSTRUCTION.split(document.replace("<s>", ""))
        if len(pieces) == 1 and not pieces[0].strip():
            continue
        if len(pieces) != 3 or pieces[0].strip():
            raise Malformed("it is not [INST] … [/INST] … by turns")
        asked = pieces[1].strip()
        if (system := _SYSTEM.match(asked)) is not None and not turns:
            turns.append({"role": "system", "content": system[1]})
            asked = asked[system.end() :]
        turns.append({"role": "user", "content": asked})
        if pieces[2].strip():
            turns.append({"role": "assistant", "content": pieces[2].strip()})
    return conversation(row, turns, reading)


def _read_chosen(row: Row, reading: Reading) -> Example:
    """The better answer of a preference pair, as if it were the only one."""
    chosen, prompt = as_turns(column(row, "chosen")), as_turns(column(row, "prompt"))
    if isinstance(chosen, str):
        if prompt is None:
            pieces = re.split(r"\n\n(Human|Assistant): ", chosen)
            turns = [
                {"role": role, "content": text.strip()} for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
            ]
            from_ = len(turns) - 1 if reading.answers_only else 0
            return conversation(row, turns, reading, learned_from=from_) if turns else Example(text=chosen)
        chosen = [{"role": "assistant", "content": chosen}]
    if not isinstance(chosen, list):
        raise Malformed("column chosen holds neither a text nor messages")
    before = prompt if isinstance(prompt, list) else [] if prompt is None else [{"role": "user", "content": prompt}]
    if before and len(chosen) > 1:  # many sets repeat the prompt in `chosen`
        before = []
    turns = [*before, *chosen]
    from_ = len(turns) - 1 if reading.answers_only else 0
    return conversation(row, turns, reading, system=_system(row), learned_from=from_)


def _read_kto(row: Row, reading: Reading) -> Example:
    if _truth(column(row, "label")) is not True:
        raise NotWanted
    return _read_prompt_completion(row, reading)


def _read_tree(row: Row, reading: Reading) -> Example:
    """A thread: `messages` of a tree's rows, or a row that holds its whole tree in `prompt`."""
    from job.data.trees import nested_thread

    turns = row["thread"] if "thread" in row else nested_thread(column(row, "prompt"))
    if not turns:
        raise Malformed("nobody answered it")
    return conversation({}, [{"role": turn["role"], "content": turn["text"]} for turn in turns], reading)


class NotWanted(Exception):
    """A row that its format leaves out on purpose. It is counted, and it is no fault."""


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None


def _looks_like_turns(rows: Sequence[Row], _: Reading) -> bool:
    values = [value for row in rows if (value := as_json(_conversation_of(row))) is not None]
    return not values or any(isinstance(value, list | dict) for value in values)


def _looks_human(rows: Sequence[Row], reading: Reading) -> bool:
    return any(str(column(row, reading.text_field)).lstrip().startswith("### Human:") for row in rows)


def _looks_nested(rows: Sequence[Row], _: Reading) -> bool:
    return any(isinstance(column(row, "prompt"), Mapping) for row in rows)


def _looks_labelled(rows: Sequence[Row], _: Reading) -> bool:
    return any(_truth(column(row, "label")) is not None for row in rows)


FORMATS = (
    Format("oasst", _read_tree, ("message_id", "parent_id", "text", "role"), also=("rank", "deleted"), trees=True),
    Format("oasst_trees", _read_tree, ("message_tree_id", "prompt"), looks_right=_looks_nested),
    Format(
        "chosen",
        _read_chosen,
        ("chosen", "rejected"),
        also=("prompt",),
        refused="These are preference rows (chosen, rejected), and this job trains on examples, not on preferences",
    ),
    Format(
        "kto",
        _read_kto,
        ("prompt", "completion", "label"),
        looks_right=_looks_labelled,
        refused="These rows have a label of true or false beside each completion, as KTO has, and the bad ones would be learned too",
        chat=False,
    ),
    Format("messages", _read_messages, either=_CONVERSATION_COLUMNS, looks_right=_looks_like_turns),
    Format("prompt_completion", _read_prompt_completion, ("prompt", "completion"), chat=False),
    Format("alpaca", _pair("instruction", "output", "input"), ("instruction", "input", "output"), also=("history",)),
    Format(
        "dolly", _pair("instruction", "response", "context"), ("instruction", "context", "response"), also=("history",)
    ),
    Format(
        "question_answer",
        _read_pairs,
        also=tuple(sorted({"history", *(name for pair in _PAIRS for name in pair)})),
        looks_right=lambda rows, _: any(_pair_of(row) is not None for row in rows),
    ),
    Format("human_assistant", _read_human_assistant, ("text",), looks_right=_looks_human),
    Format("llama2", _read_llama_2, ("text",), looks_right=lambda rows, _: False),
    Format("text", _read_text, ("text",), chat=False),
)
_ASKED_FOR = {"chosen": "to train on the chosen answers alone", "kto": "to train on the rows labelled true"}


def choose_format(wanted: str, reading: Reading, columns: Sequence[str], sample: Sequence[Row]) -> Format:
    """The format named by FT_DATASET_FORMAT, or the first that fits. Raises InputError if its columns are missing."""
    there = {name.strip().lower() for name in columns}
    for candidate in FORMATS:
        needed = set(candidate.needs(reading.text_field))
        present = needed <= there and (not candidate.either or bool(set(candidate.either) & there))
        if wanted == candidate.name:
            if not present:
                missing = ", ".join(sorted(needed - there) or [" or ".join(candidate.either)])
                raise InputError(
                    f"The dataset has no column {missing}, which FT_DATASET_FORMAT={wanted} needs. It has {', '.join(columns)}.",
                    "Set FT_DATASET_TEXT_FIELD or FT_DATASET_COLUMNS to the columns' names, or FT_DATASET_FORMAT to another format.",
                )
            return candidate
        if wanted == "auto" and present and candidate.looks_right(sample, reading):
            _refuse(candidate, reading)
            _tell_of_unused_text(candidate, there, reading)
            return candidate
    raise InputError(
        f"The dataset's columns ({', '.join(columns)}) are none that this job knows, such as messages, question and answer, "
        "instruction and output, prompt and completion, or text.",
        f"Set FT_DATASET_COLUMNS to say what they are, such as {_example(columns)}. If these are values, the file lacks its first "
        "line with the columns' names."
        + _texts_only(columns, sample),
    )  # fmt: skip


def _refuse(found: Format, reading: Reading) -> None:
    if found.refused is not None:
        others = ", or FT_DATASET_FORMAT=prompt_completion to train on all of them" if found.name == "kto" else ""
        raise InputError(f"{found.refused}.", f"Set FT_DATASET_FORMAT={found.name} {_ASKED_FOR[found.name]}{others}.")
    part = reading.text_field.lower()
    if part != "text" and found.name not in ("text", "human_assistant") and part in found.uses(reading):
        raise InputError(
            f"FT_DATASET_TEXT_FIELD={reading.text_field} names one column of rows that look like {found.name}: "
            "the rest of each row, such as the question, would not be trained on.",
            "Unset FT_DATASET_TEXT_FIELD, or set FT_DATASET_FORMAT=text to train on that column alone.",
        )


def _tell_of_unused_text(found: Format, there: set[str], reading: Reading) -> None:
    if "text" in there and "text" not in found.needs(reading.text_field):
        reading.tell(f"the column text is not used, because the rows are {found.name} (FT_DATASET_FORMAT=text uses it)")


def _example(columns: Sequence[str]) -> str:
    names = [*columns, "…", "…"]
    return json.dumps({"question": names[0], "answer": names[1]}, ensure_ascii=False)


def _texts_only(columns: Sequence[str], sample: Sequence[Row]) -> str:
    """The advice for a dataset of plain documents, which is wrong for any other."""
    long = [name for name in columns if any(isinstance(row.get(name), str) for row in sample)]
    return f" If each row is a plain document, set FT_DATASET_TEXT_FIELD={long[0]}." if len(long) == 1 else ""


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with the names of FT_DATASET_COLUMNS, each for the column that it stands for."""
    if not columns:
        return row
    found = {name: column(row, actual.strip().lower()) if actual not in row else row[actual] for name, actual in columns.items()}  # fmt: skip
    return {**row, **found}


def _system(row: Row) -> Any:
    value = column(row, "system")
    return value if value is not None else column(row, "system_prompt")


def _text(row: Row, name: str, reading: Reading, *, may_be_empty: bool = False, may_be_number: bool = True) -> str:
    value = column(row, name.lower()) if name not in row else row[name]
    if isinstance(value, Malformed):
        raise value
    if is_missing(value):
        value = None
    if may_be_number and isinstance(value, bool | int | float):
        reading.tell(f"numbers in column {name} are read as text")
        value = json.dumps(value)
    if may_be_empty and (value is None or value == ""):
        return ""
    if not isinstance(value, str):
        raise Malformed(f"column {name} is empty" if value is None else f"column {name} is not text")
    if not value.strip() and not may_be_empty:
        raise Malformed(f"column {name} is empty")
    return value
