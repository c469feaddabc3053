"""What the cards of models and datasets say of license and language. Strangers wrote them: only plain words are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.guard.front_matter import front_matter

# What the Hub takes as a license (https://huggingface.co/docs/hub/repositories-licenses). It refuses a card with any other.
_LICENSES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split())  # fmt: skip

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
        if known and name == "language":  # codes of ISO 639, to which a card may add a region
            found[name] = list(dict.fromkeys(word.partition("-")[0].lower() for word in known))
        elif known:
            found[name] = known[0]
    if "license" in found:
        named = found["license"].lower()
        found["license"] = named if named in _LICENSES else "other"
        if named not in _LICENSES:
            found.setdefault("license_name", named)
    return found


def terms_in_folder(folder: Path) -> dict[str, Any]:
    """`terms` of the README.md in a local folder, if it has one that can be read."""
    file = folder / "README.md"
    try:
        return terms(front_matter(file)) if file.is_file() else {}
    except (OSError, ValueError):  # a card is no reason to refuse a model
        return {}
