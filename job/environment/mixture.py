"""FT_DATASET_NAME: one dataset, or several that are mixed, each with its own configuration, split and weight."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.settings import Settings, whole_split

_PART = re.compile(
    r"(?P<name>[^:*]+)(:(?P<config>[^:*\[\]]*))?(:(?P<split>[^:*\[\]]+(\[[^\]]*\])?(\+[^:*\[\]]+(\[[^\]]*\])?)*))?(\*(?P<weight>[0-9.]+))?$"
)
_KEYS = ("name", "config", "split", "weight")


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture. `weight` is how often each of its rows is used; a half uses every second, by chance."""

    name: str
    config: str | None
    split: str
    weight: float = 1.0


def parts_of(text: str, *, config: str | None = None, split: str = "train") -> list[Part]:
    """The datasets that FT_DATASET_NAME names. `config` and `split` hold where a part names none.

    Raises ValueError with what is wrong.
    """
    whole = Part(text, config, split)
    if text.startswith("["):
        items: Any = _json_list(text)
        if not isinstance(items, list) or not items:
            raise ValueError("an empty list of datasets")
        return [_part(item, whole) for item in items]
    if _is_one(text):
        return [whole]
    if not (items := _split(text)):
        raise ValueError("it names no dataset")
    return [_part(item.strip(), whole) for item in items]


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _is_one(text: str) -> bool:
    """Whether a text is one source without anything behind its name, or an existing file, whatever its name is."""
    if text.startswith("s3://"):
        return not re.search(r"[,*]", text) and ":" not in text[5:]
    path = Path(text).expanduser()
    return path.exists() or not re.search(r"[,:*]", text)


def _split(text: str) -> list[str]:
    """The parts between commas that are not in brackets, as in `train[:100]`."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _part(item: Any, whole: Part) -> Part:
    if isinstance(item, dict):
        if not isinstance(item.get("name"), str) or (unknown := item.keys() - set(_KEYS)):
            wrong = min(unknown) if isinstance(item.get("name"), str) else "name"
            raise ValueError(f"a dataset is an object with name, config, split and weight; {wrong!r} is wrong")
        for key in ("name", "config", "split"):
            value = item.get(key)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ValueError(f"the {key} of a dataset is a text; {value!r} is none")
        return Part(
            item["name"],
            item.get("config") or whole.config,
            whole_split(item.get("split") or whole.split),
            _weight(item.get("weight", 1)),
        )
    if not isinstance(item, str) or not item.strip():
        raise ValueError("a dataset is a text or an object")
    if _is_one(item):
        return Part(item, whole.config, whole.split)
    scheme, rest = ("s3://", item[5:]) if item.startswith("s3://") else ("", item)
    match = _PART.match(rest)
    if match is None:
        raise ValueError(f"{item!r} is not of the form id@revision:config:split*weight")
    return Part(
        scheme + match["name"].strip(), match["config"] or whole.config, match["split"] or whole.split, _weight(match["weight"] or 1)
    )  # fmt: skip


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = 0.0
    if not 0 < weight <= 1000:
        raise ValueError(f"the weight {value!r} is not a number above 0")
    return weight


def dataset_parts(settings: Settings) -> list[Part]:
    """The datasets to train on."""
    return parts_of(settings.dataset_name, config=settings.dataset_config, split=settings.dataset_split)


def training_parts(settings: Settings, folder: Path) -> list[tuple[Part, Path]]:
    """The datasets to train on, each with its folder below `folder`; a single one fills it."""
    parts = dataset_parts(settings)
    return [(part, folder if len(parts) == 1 else folder / str(number)) for number, part in enumerate(parts, 1)]


def named_parts(settings: Settings, folder: Path) -> list[tuple[str, Part, Path]]:
    """The same, each with the name that it has in records of the run: FT_DATASET_NAME, or FT_DATASET_NAME[2]."""
    parts = training_parts(settings, folder)
    return [
        ("FT_DATASET_NAME" if len(parts) == 1 else f"FT_DATASET_NAME[{number}]", part, place)
        for number, (part, place) in enumerate(parts, 1)
    ]


def evaluation_part(settings: Settings, folder: Path, eval_folder: Path) -> tuple[Part, Path] | None:
    """What to evaluate on, or None if FT_EVAL_SPLIT is a fraction or there is nothing to evaluate on."""
    named = settings.eval_split
    if named is not None and _is_fraction(named):
        return None
    if settings.eval_dataset_name is not None:
        return Part(settings.eval_dataset_name, settings.dataset_config, named or "train"), eval_folder
    if named is None:
        return None
    part, place = training_parts(settings, folder)[0]
    return Part(part.name, part.config, named), place


def held_out_fraction(settings: Settings) -> float | None:
    """The fraction of the training data that FT_EVAL_SPLIT holds out, or None."""
    named = settings.eval_split
    return float(named) if named is not None and _is_fraction(named) and settings.eval_dataset_name is None else None


def _is_fraction(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
