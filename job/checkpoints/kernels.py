"""Stores Triton's compiled kernels with the run, which saves the next machine some ten seconds of compilation.

Triton's cache (TRITON_CACHE_DIR) has one folder per kernel, named by a hash of everything it was compiled from. Only
the GPU code and its description are stored. No host code ever comes out of a store.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

from job.errors import JobError, in_a_line
from job.run import Run

_MOST_BYTES = 32 * 2**20  # newest kernels first, since other jobs may share the folder
_FOLDER = re.compile(r"[A-Za-z0-9_-]{16,}")
_FILE = re.compile(r"[\w.-]+\.(cubin|json)")
_GROUP = "__grp__"  # prefix of the file that lists a kernel's files with their paths


def cache_dir(run: Run) -> Path:
    """Triton's cache folder for the processes of this run."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return Path(named) if named else run.paths.kernels_dir


class CompiledKernels:
    """The compiled kernels in the run's cache folder and in its store.

    They can be compiled again, so a failure here is never an error. It is only reported through `say(text, level)`.
    """

    def __init__(self, run: Run, say: Callable[[str, str], None]) -> None:
        self._run, self._say, self._folder = run, say, cache_dir(run)
        self._key, self._listing_key = f"{run.id}/kernels.tar.gz", f"{run.id}/kernels.json"
        self._known: frozenset[str] = frozenset()  # already stored, or left out for lack of room

    def fetch(self) -> None:
        """Copy kernels that are missing here from the store."""
        if not self._run.settings.keep_kernels:
            return
        try:
            packed = self._run.store.get(self._key)
            self._verify(packed)
        except FileNotFoundError:
            return
        except Exception as error:
            self._say(f"Not using the compiled kernels in the store: {in_a_line(error)}", "warning")
            return
        try:
            kernels = _unpack(packed)
            missing = {name: files for name, files in kernels.items() if not (self._folder / name).exists()}
            for name, files in missing.items():
                self._place(name, files)
        except Exception as error:  # whatever somebody put there: kernels can be compiled again
            self._say(f"Not using the compiled kernels in the store: {in_a_line(error)}.", "warning")
            return
        self._known = frozenset(kernels)
        self._say(f"Fetched {len(missing)} compiled kernels from the store.", "debug")

    def keep(self) -> None:
        """Store the local kernels if there are new ones. Called after every checkpoint."""
        if not self._run.settings.keep_kernels:
            return
        try:
            here = {path.parent for path in self._folder.glob(f"*/{_GROUP}*.json")}  # Triton writes this file last
            names = frozenset(folder.name for folder in here if _FOLDER.fullmatch(folder.name))
            if names <= self._known:
                return
            kernels = self._newest(names)
            packed = _pack(kernels)
            self._run.store.put(self._key, packed)
            listing = {"sha256": hashlib.sha256(packed).hexdigest(), "size": len(packed), "kernels": sorted(kernels)}
            self._run.store.put(self._listing_key, json.dumps(listing).encode())
        except (JobError, ValueError, OSError) as error:
            self._say(f"The compiled kernels were not stored: {getattr(error, 'message', error)}", "warning")
            return
        self._known = names
        self._say(f"Stored {len(kernels)} compiled kernels.", "debug")

    def _verify(self, packed: bytes) -> None:
        """Raise ValueError unless the archive is the one that its listing describes."""
        try:
            listing = json.loads(self._run.store.get(self._listing_key))
        except FileNotFoundError:
            raise ValueError("the archive has no listing") from None
        if listing["size"] != len(packed) or listing["sha256"] != hashlib.sha256(packed).hexdigest():
            raise ValueError("the archive differs from its listing")

    def _newest(self, names: frozenset[str]) -> dict[str, dict[str, bytes]]:
        """The newest kernels that fit in _MOST_BYTES: folder name → file name → content."""
        found, size = {}, 0
        for folder in sorted(
            map(self._folder.joinpath, names), key=lambda folder: folder.stat().st_mtime, reverse=True
        ):
            files = {file.name: file.read_bytes() for file in folder.iterdir() if _FILE.fullmatch(file.name)}
            size += sum(map(len, files.values()))
            if size > _MOST_BYTES:
                break
            found[folder.name] = {name: _with_names(name, data) for name, data in files.items()}
        return found

    def _place(self, name: str, files: dict[str, bytes]) -> None:
        """Place a kernel atomically, because another process may be looking for it."""
        partial = self._folder / f"{name}.partial-{uuid.uuid4().hex[:8]}"
        partial.mkdir(parents=True)
        try:
            for file, data in files.items():
                (partial / file).write_bytes(_with_paths(file, data, self._folder / name))
            os.replace(partial, self._folder / name)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not (self._folder / name).exists():  # else another process was faster
                raise


def _pack(kernels: dict[str, dict[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, files in kernels.items():
            for file, data in files.items():
                entry = tarfile.TarInfo(f"{name}/{file}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), compresslevel=1)


def _unpack(packed: bytes) -> dict[str, dict[str, bytes]]:
    kernels: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_decompressed(packed)), mode="r:") as archive:
            for entry in archive:
                folder, _, file = entry.name.partition("/")
                plain = entry.isreg() and not entry.issparse()  # a sparse entry of 512 bytes may be read as terabytes
                if not (plain and _FOLDER.fullmatch(folder) and _FILE.fullmatch(file)):
                    raise ValueError(f"{entry.name[:80]!r} is not a kernel file")
                content = archive.extractfile(entry)
                assert content is not None
                kernels.setdefault(folder, {})[file] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(str(error)) from error
    return kernels


def _decompressed(packed: bytes) -> bytes:
    """All of it, checksum included, unless it is more than any job stores."""
    inflate = zlib.decompressobj(wbits=31)  # gzip
    plain = inflate.decompress(packed, 2 * _MOST_BYTES)
    if not inflate.eof:
        raise ValueError("the archive is incomplete, or holds more than the job ever stores")
    return plain


def _with_names(file: str, data: bytes) -> bytes:
    """A kernel's file list without this machine's paths and without files that are not stored."""
    return _list({name: name for name in _listed(data)}) if file.startswith(_GROUP) else data


def _with_paths(file: str, data: bytes, folder: Path) -> bytes:
    """The same list with this machine's paths."""
    return _list({name: str(folder / name) for name in _listed(data)}) if file.startswith(_GROUP) else data


def _list(paths: dict[str, str]) -> bytes:
    return json.dumps({"child_paths": paths}).encode()


def _listed(data: bytes) -> list[str]:
    """The stored files named in such a list. Raises ValueError for an unknown format, as another Triton may write."""
    try:
        return [name for name in dict(json.loads(data)["child_paths"]) if _FILE.fullmatch(name)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a kernel's file list has an unknown format: {error!r}") from error
