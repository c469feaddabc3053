"""Bytes and text of a file that may be packed, in an encoding that it may show."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from job.data.files.batch import FileOptions
from job.errors import InputError

PACKED = (".gz", ".bz2", ".zst", ".xz")
LARGEST_ROW = 256 << 20  # bytes
_HEAD = 1 << 16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def _open_zst(path: Path) -> Any:
    return pa.input_stream(str(path), compression="zstd")


_UNPACKERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


class _Readable(io.RawIOBase):
    """A pyarrow stream as one that Python can buffer."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0  # as far as there is more: whoever peeks looks at as much as of a plain file
        while filled < len(buffer) and (data := self._stream.read(len(buffer) - filled)):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def opened(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a file. Raises InputError, within the block too, if they cannot be unpacked."""
    ending = path.suffix.lower()
    try:
        if ending not in _UNPACKERS:
            with path.open("rb", buffering=1 << 20) as plain:
                yield cast(io.BufferedReader, plain)
            return
        raw = _UNPACKERS[ending](path)
        with io.BufferedReader(_Readable(raw), buffer_size=1 << 20) as stream:
            yield cast(io.BufferedReader, stream)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowException) as error:
        raise _not_packed(name, ending, error) from error
    except OSError as error:
        if error.errno is None and ending in _UNPACKERS:  # what bz2 and pyarrow raise for other bytes
            raise _not_packed(name, ending, error) from error
        raise


def _not_packed(name: str, ending: str, error: BaseException) -> InputError:
    return InputError(f"{name} cannot be unpacked as {ending}: {error}", "Pack the file again, or use the plain file.")


def encoding_of(stream: io.BufferedReader, name: str, options: FileOptions) -> str:
    """The text encoding of what is about to be read: the one set, else by its mark or its zero bytes, else UTF-8."""
    if options.encoding is not None:
        return options.encoding
    head = stream.peek(_HEAD)[:_HEAD]
    found = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if found is None and len(head) >= 4 and b"\0" in head[:_HEAD]:
        even, odd = head[0::2].count(0), head[1::2].count(0)
        if max(even, odd) > len(head) // 5:
            found = "utf-16-le" if odd > even else "utf-16-be"
    if found is not None and found != "utf-8-sig":
        options.tell(f"{name} is read as {found.upper()}.")
    return found or "utf-8"


def lines(stream: io.BufferedReader, name: str, encoding: str) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, as UTF-8 if the encoding is another, with its number from 1.

    Lines of UTF-8 are not checked here: they go to the workers as they are.
    """
    source: Any = stream
    if encoding not in ("utf-8", "utf-8-sig"):
        source = _encoded(io.TextIOWrapper(cast(Any, stream), encoding=encoding, newline="\n"), name, encoding)
    number = 0
    while line := source.readline(LARGEST_ROW):
        number += 1
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        if len(line) >= LARGEST_ROW:
            raise InputError(
                f"{name}, line {number:,}: longer than {LARGEST_ROW >> 20} MiB.", "Split or remove the row."
            )
        if stripped := line.strip():
            yield number, stripped


class _encoded:
    def __init__(self, text: io.TextIOWrapper, name: str, encoding: str) -> None:
        self._text, self._name, self._encoding = text, name, encoding

    def readline(self, limit: int) -> bytes:
        try:
            return self._text.readline(limit).encode("utf-8", "surrogatepass")
        except UnicodeError as error:  # UTF-16 without its first mark is no UnicodeDecodeError
            raise wrong_encoding(self._name, self._encoding, error) from error


def wrong_encoding(name: str, encoding: str, error: UnicodeError, line: int | None = None) -> InputError:
    """The file is not in the encoding that it was taken for."""
    place = name if line is None else f"{name}, near line {line:,}"
    return InputError(
        f"{place}: not {encoding.upper()} ({getattr(error, 'reason', error)}).",
        "Save the file as UTF-8, or set FT_DATASET_ENCODING to its encoding, such as cp1252 or latin-1.",
    )


@contextmanager
def as_text(stream: io.BufferedReader, name: str, encoding: str) -> Iterator[io.TextIOWrapper]:
    """The text of a stream, with its line breaks as they are."""
    text = io.TextIOWrapper(cast(Any, stream), encoding=encoding, newline="")
    try:
        yield text
    except UnicodeError as error:
        raise wrong_encoding(name, encoding, error) from error
    finally:
        text.detach()
