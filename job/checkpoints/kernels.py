"""Kernels that Triton compiled, kept with the run: a machine that goes on with it would take some ten seconds to compile them again.

Triton's cache (TRITON_CACHE_DIR) has a folder for each kernel, named by a hash of all that it was compiled from. Kept are the GPU's
code and its description; no code of the host's comes out of a store.
"""

from __future__ import annotations

import gzip
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

from job.errors import JobError
from job.run import Run

_MOST_BYTES = 32 * 2**20  # of a folder that may be other jobs' as well: the newest kernels
_FOLDER = re.compile(r"[A-Za-z0-9_-]{16,}")
_FILE = re.compile(r"[\w.-]+\.(cubin|json)")
_GROUP = "__grp__"  # a kernel's list of files, by their paths


def cache_dir(run: Run) -> Path:
    """Where Triton keeps the kernels of this run's processes."""
    named = os.environ.get("TRITON_CACHE_DIR")
    return Path(named) if named else run.paths.kernels_dir


class CompiledKernels:
    """Those in the run's cache folder and in its store. They can be compiled again, so that nothing that fails here is an error;
    `say(text, level)` tells of it."""

    def __init__(self, run: Run, say: Callable[[str, str], None]) -> None:
        self._run, self._say, self._folder = run, say, cache_dir(run)
        self._key = f"{run.id}/kernels.tar.gz"
        self._known: frozenset[str] = frozenset()  # that are stored, or for which there was no room

    def fetch(self) -> None:
        """Take over those of the store that are not here."""
        try:
            packed = self._run.store.get(self._key)
        except FileNotFoundError:
            return
        except JobError as error:
            self._say(f"The compiled kernels in the store are not used: {error.message}", "warning")
            return
        try:
            kernels = _unpack(packed)
            missing = {name: files for name, files in kernels.items() if not (self._folder / name).exists()}
            for name, files in missing.items():
                self._place(name, files)
        except (ValueError, OSError) as error:
            self._say(f"The compiled kernels in the store are not used: {error}.", "warning")
            return
        self._known = frozenset(kernels)
        self._say(f"{len(missing)} compiled kernels fetched from the store.", "debug")

    def keep(self) -> None:
        """Store what is here, if there is more than the last time: it is asked behind every checkpoint."""
        try:
            here = {path.parent for path in self._folder.glob(f"*/{_GROUP}*.json")}  # which Triton writes last
            names = frozenset(folder.name for folder in here if _FOLDER.fullmatch(folder.name))
            if names <= self._known:
                return
            kernels = self._newest(names)
            self._run.store.put(self._key, _pack(kernels))
        except (JobError, ValueError, OSError) as error:
            self._say(f"The compiled kernels are not stored: {getattr(error, 'message', error)}", "warning")
            return
        self._known = names
        self._say(f"{len(kernels)} compiled kernels stored.", "debug")

    def _newest(self, names: frozenset[str]) -> dict[str, dict[str, bytes]]:
        """Kernels by their folders' names, as many as there is room for."""
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
        """All of a kernel or nothing: a process may be looking for it."""
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
        plain = gzip.decompress(packed)  # as a whole: tarfile would stop short of the checksum
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            for entry in archive:
                folder, _, file = entry.name.partition("/")
                content = archive.extractfile(entry)
                if content is None or not (_FOLDER.fullmatch(folder) and _FILE.fullmatch(file)):
                    raise ValueError(f"{entry.name} is no file of a kernel")
                kernels.setdefault(folder, {})[file] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(str(error)) from error
    return kernels


def _with_names(file: str, data: bytes) -> bytes:
    """A kernel's list of files without this machine's folders, and without those that are not kept."""
    return _list({name: name for name in _listed(data)}) if file.startswith(_GROUP) else data


def _with_paths(file: str, data: bytes, folder: Path) -> bytes:
    """The same list, for this machine."""
    return _list({name: str(folder / name) for name in _listed(data)}) if file.startswith(_GROUP) else data


def _list(paths: dict[str, str]) -> bytes:
    return json.dumps({"child_paths": paths}).encode()


def _listed(data: bytes) -> list[str]:
    """The files that are kept, of such a list; ValueError for one of another form, as another Triton may write."""
    try:
        return [name for name in dict(json.loads(data)["child_paths"]) if _FILE.fullmatch(name)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a kernel's list of files has another form: {error!r}") from error
