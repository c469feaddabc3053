"""A file downloaded in parts, in any order, over any number of starts."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from job import durability

PART_BYTES = 16 * 1024 * 1024


class Partial:
    """The parts of `target` fetched so far, kept next to it: their bytes, and a journal of `offset length crc32` lines.

    Parts belong to one `version` of the object, and parts of other versions are deleted. A journal line is written
    after its bytes. A later start trusts it only if the checksum matches.
    """

    def __init__(self, target: Path, version: str, size: int) -> None:
        self.target, self.size = target, size
        name = f"{target.name}.partial-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
        self._file, self._journal = target.with_name(name), target.with_name(f"{name}-parts")
        self._lock, self._descriptor = threading.Lock(), -1

    @contextmanager
    def open(self) -> Iterator[Partial]:
        durability.make_folder(self.target.parent)
        for other in self.target.parent.glob(f"{self.target.name}.partial-*"):
            if other not in (self._file, self._journal):
                other.unlink()
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(self._descriptor, self.size)
            yield self
        finally:
            os.close(self._descriptor)

    def missing(self) -> list[tuple[int, int]]:
        """The (begin, end) byte offsets of the parts still to fetch. An empty file has one empty part."""
        here = set(self._believed())
        parts = [(begin, min(begin + PART_BYTES, self.size)) for begin in range(0, max(self.size, 1), PART_BYTES)]
        return [part for part in parts if part not in here]

    def write(self, begin: int, data: bytes) -> None:
        """Save one part. Thread-safe."""
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], begin + written)
        with self._lock, self._journal.open("a", encoding="ascii") as journal:
            journal.write(f"{begin} {len(data)} {zlib.crc32(data)}\n")

    def finish(self) -> None:
        """Rename the complete file to `target`. Its bytes are durable first: its size alone would prove nothing."""
        durability.sync_file(self._file)
        durability.replace(self._file, self.target)
        self._journal.unlink(missing_ok=True)

    def _believed(self) -> Iterator[tuple[int, int]]:
        if not self._journal.exists():
            return
        for line in self._journal.read_text(encoding="ascii", errors="replace").splitlines():
            fields = line.split()
            if len(fields) == 3 and all(field.isdigit() for field in fields):  # a kill may have cut the last line
                begin, length, checksum = map(int, fields)
                if zlib.crc32(os.pread(self._descriptor, length, begin)) == checksum:
                    yield begin, begin + length
