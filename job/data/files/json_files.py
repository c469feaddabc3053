"""JSON lines, JSON lists, one object that holds the list, or objects one after another, whatever the file is called."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.data.files.batch import Batch, Damaged, FileOptions, Malformed, Row, batches
from job.data.files.streams import LARGEST_ROW, as_text, encoding_of, lines, opened
from job.errors import InputError

_PART = 1 << 20
_SPACE = re.compile(r"[\s,]*")
_LARGEST_DOCUMENT = 512 << 20  # bytes of one JSON object that holds all rows
_TURN_KEYS = ({"role", "content"}, {"from", "value"}, {"role", "value"}, {"from", "content"})


def read(path: Path, name: str, options: FileOptions) -> Iterator[Batch]:
    """The rows of a JSON file. InputError if it is one broken document."""
    with opened(path, name) as stream:
        encoding = encoding_of(stream, name, options)
        layout = _layout(stream, encoding)
        if layout == "lines":
            yield from _lines(stream, name, encoding)
            return
        with as_text(stream, name, encoding) as text:
            rows = _list(text, name) if layout == "list" else _document(text, name, options)
            yield from batches(name, rows, "row", size=lambda _: 2000)


def _lines(stream: io.BufferedReader, name: str, encoding: str) -> Iterator[Batch]:
    return batches(name, lines(stream, name, encoding), "line")


def _layout(stream: io.BufferedReader, encoding: str) -> str:
    """lines, list or document: by whether the first line is a whole value, and by what follows it."""
    head = stream.peek(_PART)[:_PART]
    text = head.decode(encoding, errors="ignore").lstrip("\ufeff").lstrip()
    first, _, rest = text.partition("\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return "list" if text.startswith("[") else "document" if _goes_on(text) else "lines"
    if rest.strip():
        holds_rows = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        return "list" if holds_rows and rest.lstrip().startswith("[") else "lines"
    if isinstance(value, list):
        return "list"
    return "document" if isinstance(value, dict) and _holder(value) else "lines"


def _goes_on(text: str) -> bool:
    """Whether an object that begins in the first line ends in another one, or is not over within what was read."""
    if not text.startswith("{"):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        first_line = text.find("\n")
        if first_line < 0:
            return _begins_with_rows(text)
        return (
            error.pos > first_line
            and re.match(r'\{\s*"(?:[^"\\\n]|\\.)*"\s*:', text) is not None
            and (len(text) >= _PART // 8 or text[:first_line].rstrip().endswith(("{", "[", ",", ":")))
        )
    except ValueError:  # a number of thousands of digits
        return text.partition("\n")[0].rstrip().endswith(("{", "[", ",", ":"))
    except RecursionError:
        return False
    return True


def _begins_with_rows(text: str) -> bool:
    """Whether a long line begins with an object whose first value is a list of rows, not one of turns."""
    begins = re.match(r'\{\s*("(?:[^"\\\n]|\\.)*")\s*:\s*\[\s*', text)
    if begins is None:
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(text, begins.end())
        return bool(_holder({json.loads(begins[1]): [first]}))
    except (ValueError, RecursionError):
        return False


def _list(text: io.TextIOWrapper, name: str) -> Iterator[tuple[int, Row | Malformed]]:
    """The elements of a JSON list, or of several one after another, as two files in one, read in pieces."""
    decoder, buffer, position, number, part, within = json.JSONDecoder(), "", 0, 0, _PART, True
    buffer = text.read(part).lstrip("\ufeff").lstrip()[1:]
    while True:
        position = _after_space(buffer, position)
        if position >= len(buffer):
            more = text.read(part)
            if not more and not within:
                return
            if not more:
                raise _broken(name, number + 1, "the list does not end")
            buffer, position = more, 0
            continue
        if buffer[position] == ("]" if within else "["):
            position, within = position + 1, not within
            continue
        if not within:
            raise _broken(name, number + 1, "something follows after the end of the list")
        try:
            value, position = decoder.raw_decode(buffer, position)
        except RecursionError:
            raise _broken(name, number + 1, "it is nested too deeply") from None
        except json.JSONDecodeError as error:
            more = text.read(part)
            if not more or len(buffer) - position > LARGEST_ROW:
                raise _broken(name, number + 1, str(error)) from error
            buffer, position, part = buffer[position:] + more, 0, min(2 * part, 64 << 20)
            continue
        except ValueError as error:  # a number of thousands of digits
            raise _broken(name, number + 1, str(error)) from error
        number += 1
        yield number, value if isinstance(value, dict) else Damaged("it is not a JSON object")


def _after_space(buffer: str, position: int) -> int:
    found = _SPACE.match(buffer, position)
    return found.end() if found is not None else position


def _document(text: io.TextIOWrapper, name: str, options: FileOptions) -> Iterator[tuple[int, Row | Malformed]]:
    """One object, or several one after another. A single one that holds a list of objects stands for that list."""
    whole = text.read(_LARGEST_DOCUMENT)
    if text.read(1):
        raise InputError(
            f"{name} is one JSON object of more than {_LARGEST_DOCUMENT >> 20} MiB.",
            "Save the rows as JSON lines: one object per line.",
        )
    decoder, position = json.JSONDecoder(), _after_space(whole, 0)
    values: list[Any] = []
    if whole.startswith("\ufeff"):
        position = _after_space(whole, 1)
    while position < len(whole):
        try:
            value, position = decoder.raw_decode(whole, position)
        except RecursionError:
            raise _broken(name, len(values) + 1, "it is nested too deeply") from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{name}, line {error.lineno:,}: not JSON: {error.msg}.",
                "Repair the file. JSON lines have one whole object per line.",
            ) from error
        except ValueError as error:
            raise _broken(name, len(values) + 1, str(error)) from error
        position = _after_space(whole, position)
        values.append(value)
    if len(values) == 1 and isinstance(values[0], dict) and (keys := _holder(values[0])):
        if len(keys) > 1:
            raise InputError(
                f"{name} holds several lists of rows: {', '.join(keys)}.", "Save each list as a file of its own."
            )
        options.tell(f"{name}: the rows are in {keys[0]!r}.")
        values = values[0][keys[0]]
    for number, value in enumerate(values, 1):
        yield number, value if isinstance(value, dict) else Damaged("it is not a JSON object")


def _holder(value: dict[str, Any]) -> list[str]:
    """The keys of an object that hold lists of rows. A list of turns is a row's own."""
    return [
        key
        for key, part in value.items()
        if isinstance(part, list)
        and part
        and all(isinstance(item, dict) for item in part[:20])
        and not any(keys <= part[0].keys() for keys in _TURN_KEYS)
        and key != "tools"
    ]


def _broken(name: str, number: int, why: str) -> InputError:
    return InputError(
        f"{name}, row {number:,}: not JSON: {why}.", "Repair the file, or save the rows as JSON lines: one per line."
    )
