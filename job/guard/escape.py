"""Text from outside, made harmless for the place where it is shown: a terminal, a log line, an event, Markdown.

Model output, column names, templates and file names are written by strangers. None of it may move a cursor, forge a line
of the log, or leave the cell or block that it was put in.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0 and C1 controls but for tab and newline; marks that reorder text; separators that some readers take for a new line
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def for_terminal(text: str) -> str:
    """Several lines are fine; control characters are shown as `\\x1b`. A lone carriage return becomes a new line."""
    return _CONTROL.sub(_shown, text.replace("\r\n", "\n").replace("\r", "\n"))


def for_line(text: str) -> str:
    """One line of a log or of an event: line breaks are shown as such."""
    return _CONTROL.sub(_shown, text).replace("\n", "\\n")


def json_line(fields: Any) -> str:
    """One line of JSON. Letters stay readable; control characters that JSON allows raw are written as escapes."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(fields, ensure_ascii=False, default=str))


def for_cell(text: str) -> str:
    """Inside a cell of a Markdown table, or anywhere in a sentence."""
    return _MARKDOWN.sub(r"\\\1", " ".join(for_terminal(text).split()))


def for_block(text: str) -> tuple[str, str]:
    """A fence that the text cannot close, and the text to put between two of them."""
    plain = for_terminal(text)
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    return "`" * max(3, longest + 1), plain


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
