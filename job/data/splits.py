"""Which files make which split of a dataset.

The card's `configs` decide if there are any, else the files' names do, by the rules of the datasets library
(https://huggingface.co/docs/hub/datasets-data-files-configuration). Either way only files that were listed and downloaded
are ever opened: a card names patterns, and patterns are matched against those files alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.data.files import kind_of
from job.errors import InputError
from job.guard.front_matter import front_matter
from job.guard.names import UnsafeName, checked

CARD = "README.md"
_MOST_PATTERNS = 1000
# What lies beside data and is none: descriptions that libraries write, and notes for people
_NO_DATA = re.compile(
    r"(dataset_infos?|dataset_dict|state|metadata|croissant|config|generation_config|tokenizer.*|special_tokens_map|"
    r"package(-lock)?|schema|MANIFEST)\.json|(readme|licen[cs]e|notice|requirements|changelog|checksums?|sha256sums?).*\.txt|indices-.*\.arrow",
    re.IGNORECASE,
)
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*$")

_SPLIT = re.compile(r"\w+(\.\w+)*")

Splits = Mapping[str, Sequence[Path]]


def find_splits(folder: Path, config: str | None) -> Splits:
    """Split → its files, for a dataset below `folder`. InputError for a card that cannot be followed.

    A single data file is the split `train`, whatever its name.
    """
    files = _data_files(folder)
    card = folder / CARD
    configs = _configs(card) if card.is_file() else []
    if configs:
        return _of_one_kind(_by_card(configs, config, files))
    files = _without_notes(files)
    if config is not None and config != "default":
        files = {name: path for name, path in files.items() if name.startswith(f"{config}/")}
        if not files:
            raise InputError(
                f"The dataset has no configuration {config!r}: its card names none, and it has no folder of that name.",
                "Unset FT_DATASET_CONFIG.",
            )
    if not files:
        raise InputError(
            "The dataset holds no data files.", "Provide Parquet, JSON, JSON lines, CSV, Arrow or text files."
        )
    saved = folder / "dataset_dict.json"
    if saved.is_file():
        return _of_one_kind(_by_folders(files))
    if len(files) == 1:
        return {"train": list(files.values())}
    return _of_one_kind(_by_names(files))


def named_by_none(folder: Path, config: str | None, splits: Splits) -> list[str]:
    """The data files that belong to no split because of their names, where nothing but names says what does."""
    card = folder / CARD
    if config not in (None, "default") or (card.is_file() and _configs(card)):
        return []
    used = {path for files in splits.values() for path in files}
    return [name for name, path in _without_notes(_data_files(folder)).items() if path not in used]


def _data_files(folder: Path) -> dict[str, Path]:
    """Name → path of all files that may hold rows."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and kind_of(path.name) is not None and not _is_hidden(path.relative_to(folder))
    }


def _without_notes(files: Mapping[str, Path]) -> dict[str, Path]:
    """The files without descriptions that libraries write, and without texts for people beside the data."""
    kept = {name: path for name, path in files.items() if not _NO_DATA.fullmatch(path.name)}
    data = {name: path for name, path in kept.items() if kind_of(path.name) != "text"}
    return data or kept


def _of_one_kind(splits: Splits) -> Splits:
    """The splits. InputError if one has files of several kinds, which may hold the same rows."""
    for files in splits.values():
        kinds: dict[str, str] = {}
        for path in files:
            kinds.setdefault(kind_of(path.name) or "", path.name)
        if len(kinds) > 1:
            listed = ", ".join(f"{name} ({kind})" for kind, name in sorted(kinds.items()))
            raise InputError(
                f"The dataset mixes files of several kinds, which may hold the same rows: {listed}.",
                "Set FT_DATASET_NAME to one of them, or to several with commas between them.",
            )
    return splits


def _by_folders(files: Mapping[str, Path]) -> Splits:
    """The layout of `DatasetDict.save_to_disk`: each split is a folder."""
    found: dict[str, list[Path]] = {}
    for name, path in files.items():
        found.setdefault(name.split("/")[0], []).append(path)
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


# -- by the card ----------------------------------------------------------------------------------------------------


def _by_card(configs: list[dict[str, Any]], wanted: str | None, files: Mapping[str, Path]) -> Splits:
    chosen = _chosen(configs, wanted)
    data_dir = chosen.get("data_dir")
    prefix = f"{_safe(str(data_dir).removesuffix('/'))}/" if data_dir else ""
    found: dict[str, list[Path]] = {}
    for split, pattern in _patterns(chosen.get("data_files", "**")):
        expression = _compiled(prefix + _safe(pattern))
        matching = [path for name, path in files.items() if expression.fullmatch(name)]
        if not matching:
            raise InputError(
                f"The dataset's card names {pattern!r}, which is none of its data files.", "The dataset needs repair."
            )
        found.setdefault(split, []).extend(path for path in matching if path not in found.get(split, ()))
    return found


def _chosen(configs: list[dict[str, Any]], wanted: str | None) -> dict[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    if wanted is None:
        defaults = [config for config in configs if config.get("default") is True] or [
            config for config, name in zip(configs, names, strict=True) if name == "default"
        ]
        if defaults or len(configs) == 1:
            return (defaults or configs)[0]
        raise InputError(
            f"The dataset has several configurations: {', '.join(names[:40])}.",
            "Set FT_DATASET_CONFIG to one of them.",
        )
    if wanted not in names:
        raise InputError(
            f"The dataset has no configuration {wanted!r}. It has {', '.join(names[:40])}.",
            "Set FT_DATASET_CONFIG to one of them.",
        )
    return configs[names.index(wanted)]


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) for each that the card names."""
    items = data_files if isinstance(data_files, list) else [data_files]
    found: list[tuple[str, str]] = []
    for item in items:
        split, paths = ("train", item) if not isinstance(item, dict) else (item.get("split", "train"), item.get("path"))
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(path, str) or not isinstance(split, str):
                raise InputError("The dataset's card has data_files that are not file names.", "It needs repair.")
            if not _SPLIT.fullmatch(split):
                raise InputError(
                    f"The dataset's card names a split {split[:80]!r}.", "A split's name is letters and digits."
                )
            found.append((split, path))
    if len(found) > _MOST_PATTERNS:
        raise InputError(f"The dataset's card names {len(found)} file patterns.", f"At most {_MOST_PATTERNS} are read.")
    return found


def _safe(pattern: str) -> str:
    try:
        return checked(pattern.removeprefix("./"))
    except UnsafeName as error:
        raise InputError(
            f"The dataset's card names a file outside of the dataset: {error}.",
            "Only files of the dataset itself are read. Do not use it if you do not trust it.",
        ) from error


def _compiled(pattern: str) -> re.Pattern[str]:
    """A glob in which `*` stays within a folder and `**` does not. A folder's name means all below it."""
    expression = ""
    for token in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        expression += {"**/": "(?:.+/)?", "**": ".+", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return re.compile(f"{expression}(?:/.+)?")


def _configs(card: Path) -> list[dict[str, Any]]:
    """The card's `configs`; empty where it has none."""
    try:
        metadata = front_matter(card)
    except ValueError as error:
        raise InputError(f"The metadata of the dataset's {CARD} cannot be read: {error}", "It needs repair.") from error
    configs = metadata.get("configs")
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputError(f"The `configs` of the dataset's {CARD} are not a list of configurations.", "It needs repair.")
    return configs


# -- by the files' names --------------------------------------------------------------------------------------------


def _by_names(files: Mapping[str, Path]) -> Splits:
    """Shards in data/ name their split. Else a folder or file named like a split is one; else all files are `train`."""
    shards: dict[str, list[Path]] = {}
    for name, path in files.items():
        if (shard := _SHARD.search(name)) is not None:
            shards.setdefault(shard[1], []).append(path)
    if shards:
        return shards
    found: dict[str, list[Path]] = {}
    for name, path in files.items():
        if (split := _named_split(name)) is not None:
            found.setdefault(split, []).append(path)
    return found or {"train": list(files.values())}


def _named_split(name: str) -> str | None:
    words = set(re.split(r"[-._ 0-9/]+", name.lower()))
    return next((split for split, keywords in _KEYWORDS.items() if words & set(keywords)), None)
