"""What a dataset's rows look like, and how each form becomes text or a conversation.

A new format is one `Format` in `FORMATS` and its name in FT_DATASET_FORMAT's list (settings.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from job.errors import InputError, from_os_error
from job.run import Run

Message = dict[str, str]
Row = Mapping[str, Any]
_BUILDERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "csv": "csv", "arrow": "arrow"}
_TURN = re.compile(r"### (Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Malformed(ValueError):
    """One row is not what its format promises."""


@dataclass(frozen=True)
class Example:
    """One row in one of three forms: plain `text`; a conversation `messages`; or `messages` of which the last
    `learned_turns` answer the others (None: all assistant turns do); or `text` of which only `completion` answers."""

    text: str | None = None
    completion: str | None = None
    messages: Sequence[Message] | None = None
    learned_turns: int | None = None


@dataclass(frozen=True)
class Format:
    """One form of rows: `columns` it needs, `looks_right` on a sample of rows, `read` for one row."""

    name: str
    columns: Callable[[str], tuple[str, ...]]
    looks_right: Callable[[Sequence[Row], str], bool]
    read: Callable[[Row, str], Example]


def _read_text(row: Row, text_field: str) -> Example:
    return Example(text=_text(row, text_field))


def _read_messages(row: Row, _text_field: str) -> Example:
    return Example(messages=_messages(row["messages"]))


def _read_prompt_completion(row: Row, _text_field: str) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(text=prompt, completion=completion)
    answers = _messages(completion)
    return Example(messages=[*_messages(prompt), *answers], learned_turns=len(answers))


def _read_human_assistant(row: Row, text_field: str) -> Example:
    """`### Human: …### Assistant: …`, as in timdettmers/openassistant-guanaco, to a conversation.

    Only the role marks split the text, so that headings (`###`) inside an answer stay. A question that nobody answered
    at the end is left out.
    """
    pieces = _TURN.split(_text(row, text_field))
    turns = [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise Malformed("no ### Human: … ### Assistant: … pair")
    return Example(messages=turns)


FORMATS = (
    Format("messages", lambda _: ("messages",), lambda rows, _: True, _read_messages),
    Format("prompt_completion", lambda _: ("prompt", "completion"), lambda rows, _: True, _read_prompt_completion),
    Format(
        "human_assistant",
        lambda text_field: (text_field,),
        lambda rows, text_field: any(str(row[text_field]).lstrip().startswith("### Human:") for row in rows),
        _read_human_assistant,
    ),
    Format("text", lambda text_field: (text_field,), lambda rows, _: True, _read_text),
)


def choose_format(wanted: str, text_field: str, columns: Sequence[str], sample: Sequence[Row]) -> Format:
    """The format named by FT_DATASET_FORMAT, or the first that fits; InputError if the columns are not there."""
    for candidate in FORMATS:
        present = set(candidate.columns(text_field)) <= set(columns)
        if wanted == candidate.name and not present:
            missing = ", ".join(sorted(set(candidate.columns(text_field)) - set(columns)))
            raise InputError(
                f"The dataset has no column {missing}, which FT_DATASET_FORMAT={wanted} needs; it has {', '.join(columns)}.",
                "Set FT_DATASET_TEXT_FIELD to the column that holds the text, or FT_DATASET_FORMAT to another form.",
            )
        if wanted == candidate.name or (wanted == "auto" and present and candidate.looks_right(sample, text_field)):
            return candidate
    forms = "; ".join(f"{item.name}: {', '.join(item.columns(text_field))}" for item in FORMATS)
    raise InputError(
        f"The dataset's columns ({', '.join(columns)}) fit none of the known forms ({forms}).",
        "Set FT_DATASET_TEXT_FIELD to the column that holds the text, or rename the columns.",
    )


def load_split(folder: Path, split: str, config: str | None, cache_dir: Path) -> Dataset:
    """Read one split of the files below `folder`; InputError, naming what there is, if it cannot be had or is empty.

    A single data file is the split `train`, whatever its name.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md"]
    try:
        if len(files) == 1:
            suffix = next(part for part in reversed(files[0].name.split(".")) if part in _BUILDERS)
            loaded = load_dataset(
                _BUILDERS[suffix], data_files={"train": str(files[0])}, split=split, cache_dir=str(cache_dir)
            )
        else:
            loaded = load_dataset(str(folder), name=config, split=split, cache_dir=str(cache_dir))
    except Exception as error:  # datasets raises many kinds for files that are not what their name says
        if from_os_error(error) is not None:
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        if "corresponds to no data" in reason:
            raise _empty(split) from error
        raise InputError(
            f"The dataset has no split {split!r} that can be read: {reason}",
            "Check FT_DATASET_SPLIT, FT_DATASET_CONFIG, FT_EVAL_SPLIT and the files.",
        ) from error
    assert isinstance(loaded, Dataset) and not isinstance(loaded, DatasetDict)
    if len(loaded) == 0:
        raise _empty(split)
    return loaded


def _empty(split: str) -> InputError:
    return InputError(
        f"The dataset's split {split!r} is empty.", "Name a split that has rows: FT_DATASET_SPLIT, FT_EVAL_SPLIT."
    )


def check_columns(run: Run, folder: Path) -> None:
    """Fail now, before the model is downloaded, if a split is not there or its columns cannot be used."""
    settings, named = run.settings, evaluation_split(run)
    splits = {settings.dataset_split}
    if folder == run.paths.eval_dataset_dir:
        splits = {named or "train"}
    elif named is not None and settings.eval_dataset_name is None:
        splits.add(named)
    for split in sorted(splits):
        rows = load_split(folder, split, settings.dataset_config, cache_dir_of(run))
        choose_format(settings.dataset_format, settings.dataset_text_field, rows.column_names, [rows[0]])


def evaluation_split(run: Run) -> str | None:
    """The split that FT_EVAL_SPLIT names, or None where it is a fraction or nothing."""
    named = run.settings.eval_split
    if named is not None and _is_fraction(named):
        return None
    return named or ("train" if run.settings.eval_dataset_name else None)


def held_out_fraction(run: Run) -> float | None:
    """The part of the training data that FT_EVAL_SPLIT holds out, or None."""
    named = run.settings.eval_split
    return float(named) if named is not None and _is_fraction(named) else None


def cache_dir_of(run: Run) -> Path:
    """Where the datasets library keeps its Arrow copies of this run's files."""
    return run.paths.run_dir / "datasets-cache"


def _is_fraction(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _text(row: Row, text_field: str) -> str:
    value = row[text_field]
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"column {text_field} is empty or no text")
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Malformed("no messages")
    turns = []
    for turn in value:
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise Malformed("a message is not {role, content} with text in both")
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns
