"""A manifest lists the files of an artefact with their hashes. An artefact does not exist until its manifest is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType

from job import durability
from job.errors import NodeError, TransientError
from job.guard.names import UnsafeName, below
from job.run import now, write_json
from job.storage import Conflict, Store, is_unfinished

MANIFEST = "MANIFEST.json"
_FETCHES = 3
_HASHED_AT_ONCE = 1 << 18  # bytes

# File name → (size in bytes, modification time in nanoseconds)
Listing = dict[str, tuple[int, int]]


class Rejected(Exception):
    """Stored files differ from their manifest. The message names the first one."""


@dataclass(frozen=True)
class Entry:
    """One file: its path relative to the manifest, its size in bytes and its SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of one artefact and the fingerprint of the settings that made it."""

    fingerprint: str
    created: str
    files: tuple[Entry, ...]

    @classmethod
    def of(
        cls,
        folder: Path,
        fingerprint: str,
        listing: Listing | None = None,
        go_on: Callable[[], None] = lambda: None,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> Manifest:
        """Hash every file below `folder`, following links, with one thread per core.

        A `listing` limits this to the files that it names. Raises TransientError if one of them has changed since.
        `go_on` is called between parts and may raise to abort. `known` are hashes that were taken while a file was written.
        """
        names = sorted(_files_below(folder) if listing is None else listing)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(lambda name: known.get(name) or sha256(folder / name, go_on), names))
        for name, state in (listing or {}).items():
            if _state(folder / name) != state:
                raise TransientError(f"{folder / name} changed while it was being read.", "Start the job again.")
        entries = (
            Entry(name, (folder / name).stat().st_size, digest) for name, digest in zip(names, digests, strict=True)
        )
        return cls(fingerprint, now(), tuple(entries))

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Parse the output of `to_bytes`. Raises Rejected if it is not a manifest."""
        try:
            raw = json.loads(data)
            files = tuple(Entry(str(item["path"]), int(item["size"]), str(item["sha256"])) for item in raw["files"])
            return cls(str(raw["fingerprint"]), str(raw["created"]), files)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise Rejected(f"{MANIFEST} is not readable: {error!r}") from error

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def matches(self, folder: Path, since_ns: int, *, replaced: bool = False) -> bool:
        """Whether every file exists with its listed size and was not modified after `since_ns` (since the epoch).

        This is enough for files that only the job writes, and made durable. Reading 13 GB again to check the hashes would
        cost paid time. With `replaced`, a file that was put in another's place since then counts as modified, whatever
        its own time says: other people's files may be copied with theirs.
        """
        for entry in self.files:
            try:
                stat = (folder / entry.path).stat()
            except (OSError, ValueError):
                return False
            changed = max(stat.st_mtime_ns, stat.st_ctime_ns) if replaced else stat.st_mtime_ns
            if not S_ISREG(stat.st_mode) or stat.st_size != entry.size or changed > since_ns:
                return False
        return True

    def holds(self, folder: Path) -> bool:
        """Whether the files are exactly the listed ones, byte for byte. Reads all of them."""
        try:
            return Manifest.of(folder, self.fingerprint).files == self.files
        except OSError:
            return False


def sha256(path: Path, go_on: Callable[[], None] = lambda: None) -> str:
    """The hexadecimal SHA-256 of a file. `go_on` is called between its parts and may raise to abort."""
    digest, part = hashlib.sha256(), memoryview(bytearray(_HASHED_AT_ONCE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(part):
            go_on()
            digest.update(part[:count])
    return digest.hexdigest()


def commit(
    store: Store,
    prefix: str,
    folder: Path,
    fingerprint: str,
    may_write: Callable[[], None] = lambda: None,
    *,
    hashed: Manifest | None = None,
) -> Manifest:
    """Copy `folder` to the store below `prefix`, then commit it by writing its manifest last.

    An artefact with the same content is left as it is. One with different content is withdrawn first. `may_write` is
    called right before the manifest is written, and raises if another attempt has taken over. `hashed` is the folder's
    manifest, if its files have been hashed already.
    """
    key = f"{prefix}/{MANIFEST}"
    committed = read(store, prefix)
    if committed is not None:
        manifest = hashed or Manifest.of(folder, fingerprint)
        if (committed.fingerprint, committed.files) == (manifest.fingerprint, manifest.files):
            return committed
    store.delete(key)  # different content, or an unreadable manifest
    with ThreadPoolExecutor(1) as pool:  # hash while uploading: both read the same files
        hashing = pool.submit(lambda: hashed or Manifest.of(folder, fingerprint))
        for name in sorted(_files_below(folder)):
            store.upload(folder / name, f"{prefix}/{name}")
        manifest = hashing.result()
    may_write()
    try:
        store.put_if_absent(key, manifest.to_bytes())
    except Conflict:  # somebody else was faster, or we wrote it and the response was lost
        there = read(store, prefix)
        if there is None or (there.fingerprint, there.files) != (manifest.fingerprint, manifest.files):
            raise TransientError(
                f"Another process is writing {prefix} in {store.url}.",
                "Run only one job per FT_RUN_ID, then start again.",
            ) from None
    return manifest


def read(store: Store, prefix: str) -> Manifest | None:
    """The manifest below `prefix`, or None if nothing was committed there."""
    try:
        return Manifest.parse(store.get(f"{prefix}/{MANIFEST}"))
    except (FileNotFoundError, Rejected):
        return None


def restore(store: Store, prefix: str, folder: Path) -> Manifest:
    """Copy a committed artefact to `folder`, replacing it. `folder` is then durable and marked.

    Raises Rejected if the store's copy is damaged beyond doubt, and NodeError if it seems to be another one at each
    reading, which says more about this machine.
    """
    try:
        manifest = Manifest.parse(store.get(f"{prefix}/{MANIFEST}"))
    except FileNotFoundError:
        raise Rejected(f"{prefix} has no manifest") from None
    digest = hashlib.sha256(manifest.to_bytes()).hexdigest()[:12]
    partial = folder.with_name(f"{folder.name}.partial-{digest}")  # so a killed start's parts are reused
    try:
        for entry in manifest.files:
            _fetch_verified(store, prefix, entry, partial)
        partial.mkdir(parents=True, exist_ok=True)
        durability.sync_tree(partial)
        write_json(partial / MANIFEST, asdict(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        durability.replace(partial, folder)
    except Rejected:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _fetch_verified(store: Store, prefix: str, entry: Entry, folder: Path) -> None:
    try:
        target = below(folder, entry.path)
    except UnsafeName as error:
        raise Rejected(f"{prefix} lists a path outside itself: {error}") from error
    seen: set[tuple[int, str]] = set()
    for _ in range(_FETCHES):  # a retry fixes damage in transit, but not damage in the store
        if target.is_file():
            if target.stat().st_size == entry.size and sha256(target) == entry.sha256:
                return
            target.unlink()
        try:
            store.download(f"{prefix}/{entry.path}", target)
        except FileNotFoundError:
            raise Rejected(f"{prefix}/{entry.path} is missing") from None
        found = target.stat().st_size, sha256(target)
        if found == (entry.size, entry.sha256):
            return
        seen.add(found)
    if len(seen) > 1:  # what is stored is the same at each reading
        target.unlink()
        raise NodeError(
            f"{prefix}/{entry.path} arrived in {len(seen)} different forms in {_FETCHES} readings, none of which is what was stored.",
            "This machine's memory, disk or network damages data: use another machine. What is stored was left as it is.",
        )
    raise Rejected(f"{prefix}/{entry.path} differs from its manifest")


def listed(folder: Path) -> Listing:
    """The files below `folder` as they are now, so that `Manifest.of` can detect later changes."""
    return {name: _state(folder / name) for name in _files_below(folder)}


def mark(folder: Path, manifest: Manifest, go_on: Callable[[], None] = lambda: None) -> None:
    """Mark the local `folder` as complete, once its files would survive a power cut."""
    durability.sync_tree(folder, go_on)
    write_json(folder / MANIFEST, asdict(manifest))
    states = [(folder / entry.path).stat() for entry in manifest.files]
    newest = max((time for state in states for time in (state.st_mtime_ns, state.st_ctime_ns)), default=0)
    if newest > (folder / MANIFEST).stat().st_mtime_ns:  # the clock was set back meanwhile
        os.utime(folder / MANIFEST, ns=(newest, newest))


def marked(folder: Path, *, replaced: bool = False) -> Manifest | None:
    """The manifest of a complete local folder, or None if it has none or a file is missing or changed.

    `replaced` is that of `Manifest.matches`.
    """
    file = folder / MANIFEST
    try:
        manifest = Manifest.parse(file.read_bytes())
    except (FileNotFoundError, Rejected):
        return None
    return manifest if manifest.matches(folder, file.stat().st_mtime_ns, replaced=replaced) else None


def _state(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _files_below(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = (Path(parent) / name).relative_to(folder).as_posix()
            if path != MANIFEST and not is_unfinished(name):
                yield path
