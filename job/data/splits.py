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

import yaml

from job.errors import InputError
from job.guard.names import UnsafeName, checked

CARD = "README.md"
_LARGEST_CARD = 1 << 20  # bytes of the card that are read
_MOST_PATTERNS = 1000
_SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_PACKED = (".gz", ".bz2", ".zst", ".xz")
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*$")

_SPLIT = re.compile(r"\w+(\.\w+)*")

Splits = Mapping[str, Sequence[Path]]


def reader_of(path: Path) -> str | None:
    """The kind of file that `path` is: json, parquet, csv or arrow; None for any other."""
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return _SUFFIXES.get(f".{name.rpartition('.')[2]}") if "." in name else None


def find_splits(folder: Path, config: str | None) -> Splits:
    """Split → its files, for a dataset below `folder`. InputError for a card that cannot be followed.

    A single data file is the split `train`, whatever its name.
    """
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and reader_of(path) is not None and not _is_hidden(path.relative_to(folder))
    }
    card = folder / CARD
    configs = _configs(card) if card.is_file() else []
    if configs:
        return _by_card(configs, config, files)
    if config is not None and config != "default":
        files = {name: path for name, path in files.items() if name.startswith(f"{config}/")}
        if not files:
            raise InputError(
                f"The dataset has no configuration {config!r}: its card names none, and it has no folder of that name.",
                "Unset FT_DATASET_CONFIG.",
            )
    if len(files) == 1:
        return {"train": list(files.values())}
    return _by_names(files)


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


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases, with which a small text becomes a large structure."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _configs(card: Path) -> list[dict[str, Any]]:
    """The card's `configs`; empty where it has none."""
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(_LARGEST_CARD)
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return []
    try:
        metadata = yaml.load(found[1], Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"The metadata of the dataset's {CARD} cannot be read: {first}", "It needs repair.") from error
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
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
