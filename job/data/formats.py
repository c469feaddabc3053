"""The row formats of datasets, and how each becomes text or a conversation.

To add a format, add a `Format` to `FORMATS` and its name to the choices of FT_DATASET_FORMAT (settings.py).
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetBuilder
from datasets.data_files import DataFilesDict, DataFilesList

from job.data.bounds import refuse_bombs, refuse_deep_json
from job.data.splits import Splits, find_splits, reader_of
from job.errors import InputError, from_os_error
from job.settings import Settings

Message = dict[str, str]
Row = Mapping[str, Any]
_TURN = re.compile(r"### (Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Malformed(ValueError):
    """A row does not match its format."""


@dataclass(frozen=True)
class Example:
    """One row: plain `text`, a prompt in `text` with its `completion`, or a conversation in `messages`.

    If `learned_turns` is set, the last `learned_turns` messages are the completion of those before them.
    """

    text: str | None = None
    completion: str | None = None
    messages: Sequence[Message] | None = None
    learned_turns: int | None = None


@dataclass(frozen=True)
class Format:
    """One row format: the `columns` it needs, `looks_right` to detect it in sample rows, and `read` for one row."""

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
    """Turn `### Human: …### Assistant: …`, as in timdettmers/openassistant-guanaco, into a conversation.

    Only the role marks split the text, so headings (`###`) inside an answer survive. An unanswered question at the end
    is dropped.
    """
    pieces = _TURN.split(_text(row, text_field))
    turns = [
        {"role": _ROLES[role], "content": content.strip()}
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise Malformed("there is no ### Human: … ### Assistant: … pair")
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
    """The format named by FT_DATASET_FORMAT, or the first that fits. Raises InputError if its columns are missing."""
    for candidate in FORMATS:
        present = set(candidate.columns(text_field)) <= set(columns)
        if wanted == candidate.name and not present:
            missing = ", ".join(sorted(set(candidate.columns(text_field)) - set(columns)))
            raise InputError(
                f"The dataset has no column {missing}, which FT_DATASET_FORMAT={wanted} needs. It has {', '.join(columns)}.",
                "Set FT_DATASET_TEXT_FIELD to the column that holds the text, or FT_DATASET_FORMAT to another format.",
            )
        if wanted == candidate.name or (wanted == "auto" and present and candidate.looks_right(sample, text_field)):
            return candidate
    forms = "; ".join(f"{item.name}: {', '.join(item.columns(text_field))}" for item in FORMATS)
    raise InputError(
        f"The dataset's columns ({', '.join(columns)}) match none of the known formats ({forms}).",
        "Set FT_DATASET_TEXT_FIELD to the column that holds the text, or rename the columns.",
    )


def load_split(folder: Path, split: str, config: str | None, cache_dir: Path) -> Dataset:
    """Read one split of the files below `folder`, such as `train` or `train[:100]`.

    Opens no other file, whatever the dataset's card says. InputError if the split cannot be read or is empty.
    """
    splits = find_splits(folder, config)
    named = {part.partition("[")[0].strip() for part in split.split("+")} - {"all"}
    if missing := named - splits.keys():
        raise InputError(
            f"The dataset has no split {min(missing)!r}. It has {', '.join(sorted(splits))}.",
            "Check FT_DATASET_SPLIT and FT_EVAL_SPLIT.",
        )
    wanted = {name: files for name, files in splits.items() if not named or name in named}
    listed = [path for files in wanted.values() for path in files]
    refuse_bombs(listed, shutil.disk_usage(_existing(cache_dir)).free)
    for path in listed:
        if path.suffix in (".json", ".jsonl"):
            refuse_deep_json(path)
    try:
        builder = _builder(wanted, cache_dir)
        builder.download_and_prepare()
        loaded = builder.as_dataset(split=split)
    except Exception as error:  # datasets raises many exception types for files that do not match their suffix
        if isinstance(error, InputError) or from_os_error(error) is not None:
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        if "corresponds to no data" in reason:
            raise _empty(split) from error
        raise InputError(
            f"The dataset's split {split!r} cannot be read: {reason}",
            "Check FT_DATASET_SPLIT, FT_DATASET_CONFIG, FT_EVAL_SPLIT and the data files.",
        ) from error
    assert isinstance(loaded, Dataset)
    if len(loaded) == 0:
        raise _empty(split)
    return loaded


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _builder(splits: Splits, cache_dir: Path) -> DatasetBuilder:
    """The library's reader for these files, given each by its path.

    `load_dataset` would follow the card's patterns, take brackets in names for patterns, and count the load on a server.
    """
    kinds = {reader_of(path) for files in splits.values() for path in files}
    if len(kinds) != 1:
        raise InputError(
            f"The dataset mixes files of several kinds: {', '.join(sorted(map(str, kinds)))}.",
            "Name one file or folder, or choose a split or configuration whose files are alike.",
        )
    module = importlib.import_module(_READERS[str(kinds.pop())])
    reader = next(
        item for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, DatasetBuilder) and item.__module__ == module.__name__
    )  # fmt: skip
    listed = {
        name: DataFilesList([str(path) for path in files], [_version(path) for path in files])
        for name, files in splits.items()
    }
    found: DatasetBuilder = reader(cache_dir=str(cache_dir), data_files=DataFilesDict(listed))
    return found


_READERS = {kind: f"datasets.packaged_modules.{kind}.{kind}" for kind in ("json", "parquet", "csv", "arrow")}


def _version(path: Path) -> tuple[str, ...]:
    """What distinguishes a file from an earlier one of its name, for the library's cache."""
    state = path.stat()
    return str(state.st_size), str(state.st_mtime_ns)


def _empty(split: str) -> InputError:
    return InputError(
        f"The dataset's split {split!r} is empty.", "Set FT_DATASET_SPLIT and FT_EVAL_SPLIT to splits that have rows."
    )


def check_columns(settings: Settings, folder: Path, cache_dir: Path, *, splits: Iterable[str]) -> None:
    """Fail before the model is downloaded if a split is missing or its columns cannot be used."""
    for split in sorted(splits):
        rows = load_split(folder, split, settings.dataset_config, cache_dir)
        choose_format(settings.dataset_format, settings.dataset_text_field, rows.column_names, [rows[0]])


def training_splits(settings: Settings) -> set[str]:
    """The splits that are read from the training dataset."""
    named = evaluation_split(settings)
    shared = named is not None and settings.eval_dataset_name is None
    return {settings.dataset_split} | ({str(named)} if shared else set())


def evaluation_split(settings: Settings) -> str | None:
    """The split to evaluate on, or None if FT_EVAL_SPLIT is a fraction or there is nothing to evaluate on."""
    named = settings.eval_split
    if named is not None and _is_fraction(named):
        return None
    return named or ("train" if settings.eval_dataset_name else None)


def held_out_fraction(settings: Settings) -> float | None:
    """The fraction of the training data that FT_EVAL_SPLIT holds out, or None."""
    named = settings.eval_split
    return float(named) if named is not None and _is_fraction(named) else None


def _is_fraction(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _text(row: Row, text_field: str) -> str:
    value = row[text_field]
    if not isinstance(value, str) or not value.strip():
        raise Malformed(f"column {text_field} is empty or not text")
    return value


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Malformed("there are no messages")
    turns = []
    for turn in value:
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("role"), str)
            or not isinstance(turn.get("content"), str)
        ):
            raise Malformed("a message must have the text fields role and content")
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns
