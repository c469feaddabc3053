"""What the cards of models and datasets say of license and language. Strangers wrote them: only plain words are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.guard.front_matter import front_matter

_WORDS = {
    "license": re.compile(r"[\w.+-]{1,60}"),
    "license_name": re.compile(r"[\w.+-]{1,60}"),
    "license_link": re.compile(r"LICENSE[\w.-]{0,40}|https://[\w./%#-]{1,200}"),
    "language": re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{2,8})?"),
}


def terms(card: Mapping[str, Any]) -> dict[str, Any]:
    """License and language from a card's metadata, as far as they are what such fields hold."""
    found: dict[str, Any] = {}
    for name, pattern in _WORDS.items():
        value = card.get(name)
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
        known = [word for word in words[:20] if pattern.fullmatch(word)]
        if known:
            found[name] = known if name == "language" else known[0]
    return found


def terms_in_folder(folder: Path) -> dict[str, Any]:
    """`terms` of the README.md in a local folder, if it has one that can be read."""
    file = folder / "README.md"
    try:
        return terms(front_matter(file)) if file.is_file() else {}
    except (OSError, ValueError):  # a card is no reason to refuse a model
        return {}
