"""The YAML at the top of a model's or dataset's README.md, which strangers wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 20  # characters


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases, with which a small text becomes a large structure."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a card; empty where it has none. Raises ValueError, in one line, if it cannot be read."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(_LARGEST)
    found = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        metadata = yaml.load(found[1], Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return metadata if isinstance(metadata, dict) else {}
