"""Recognises what the rows of a dataset are, before anything else is downloaded."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from job.data.bounds import refuse_bombs
from job.data.conversations import Reading
from job.data.files import FileOptions, Malformed, Row
from job.data.formats import Format, choose_format, renamed
from job.data.selection import Selection, select
from job.environment.mixture import Part, dataset_parts, evaluation_part, training_parts
from job.errors import InputError
from job.settings import Settings

_SAMPLE = 200  # rows of a file that a format is recognised by
_FILES = 50


def check_rows(settings: Settings, downloaded: Path, folder: Path, eval_folder: Path) -> None:
    """Raise InputError if a split of the dataset just downloaded is missing or its rows cannot be used.

    `downloaded` is one of the datasets below `folder`, or `eval_folder`.
    """
    wanted: list[tuple[Part, Path, str]] = [
        (part, place, "FT_DATASET_SPLIT") for part, place in training_parts(settings, folder)
    ]
    found = evaluation_part(settings, folder, eval_folder)
    if found is not None:
        wanted.append((*found, "FT_EVAL_SPLIT"))
    for part, place, variable in wanted:
        if place == downloaded:
            reading = reading_of(settings)
            options = FileOptions(settings.dataset_encoding, settings.dataset_separator)
            selection = select(place, part.split, part.config, options, variable=variable)
            refuse_bombs(selection.files(), shutil.disk_usage(place).free)
            recognised(selection, options, settings, reading)


def reading_of(settings: Settings) -> Reading:
    return Reading(
        text_field=settings.dataset_text_field,
        columns=settings.dataset_columns,
        roles={name.strip().lower(): role for name, role in settings.dataset_roles.items()},
        system_prompt=settings.system_prompt,
        system_role=settings.system_role,
        ignored_keys=frozenset(settings.ignored_message_keys),
        completion_only=settings.completion_only_loss and settings.train_on == "auto",
        answers_only=settings.train_on == "auto",
    )


def recognised(
    selection: Selection, options: FileOptions, settings: Settings, reading: Reading
) -> tuple[Format, frozenset[str]]:
    """The format of the first rows, and the columns that it reads. InputError if they are none, or unknown."""
    sample: list[Row] = []
    raw: list[tuple[str, ...]] = []  # the columns of each row as the file has them
    names: dict[str, None] = {}
    seen: dict[str, int] = {}
    quiet = replace(options, tell=lambda text: None)
    first_bad: tuple[str, Malformed] | None = None
    for batch in selection.batches(quiet):
        if seen.get(batch.file, 0) >= _SAMPLE or len(seen) > _FILES:
            if len(sample) >= _SAMPLE:
                break
            continue
        for number, row in batch.rows():
            if isinstance(row, Malformed):
                first_bad = first_bad or (batch.place(number), row)
                continue
            raw.append(tuple(row))
            row = renamed(row, settings.dataset_columns)
            sample.append(row)
            names |= dict.fromkeys(row)
            seen[batch.file] = seen.get(batch.file, 0) + 1
            if seen[batch.file] >= _SAMPLE:
                break
    if not sample and first_bad is not None:
        raise InputError(f"{first_bad[0]}: {first_bad[1]}, and no row before it can be read.", "Repair the data files.")
    if not sample:
        raise InputError(
            f"The dataset's split {selection.split!r} is empty.",
            "Set FT_DATASET_SPLIT and FT_EVAL_SPLIT to splits that have rows.",
        )
    if (
        len(dataset_parts(settings)) == 1 and settings.eval_dataset_name is None
    ):  # of several, each may have some of the columns
        _refuse_absent_columns(settings.dataset_columns, raw)
    chosen = choose_format(settings.dataset_format, reading, list(names), sample)
    return chosen, chosen.uses(reading)


def _refuse_absent_columns(wanted: Mapping[str, str], rows: Sequence[tuple[str, ...]]) -> None:
    """Raise InputError for a column of FT_DATASET_COLUMNS that is surely a slip: a system prompt would be lost without a word.

    Rows of JSON may have a column only now and then, so where rows differ, only a name that looks like another is refused.
    """
    there = list(dict.fromkeys(name.strip().lower() for names in rows for name in names))
    for name, actual in wanted.items():
        if actual.strip().lower() in there:
            continue
        near = difflib.get_close_matches(actual.strip().lower(), there, n=1, cutoff=0.75)
        if near or len(set(map(frozenset, rows))) == 1:
            meant = f"Did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"FT_DATASET_COLUMNS reads {name!r} from the column {actual!r}, which the rows do not have.",
                f"{meant}They have {', '.join(there[:20])}.",
            )
