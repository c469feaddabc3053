"""Publishes below an `s3://` prefix, through the store: files, then a manifest that vouches for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from job import durability
from job.checkpoints import manifest
from job.errors import SettingsError
from job.hub.ownership import RECORD, hashes, is_there, refuse_others, remember, update
from job.run import Run
from job.storage import open_store
from job.storage.proof import prove


class Bucket:
    """A prefix of a bucket. It holds the model and MANIFEST.json, with each file's size and SHA-256, written last."""

    def __init__(self, run: Run, url: str) -> None:
        bucket, _, prefix = url.partition("://")[2].strip("/").partition("/")
        self._run, self._url = run, url
        self._store, self._prefix = open_store(f"s3://{bucket}"), prefix

    def __str__(self) -> str:
        return self._url

    def check(self) -> None:
        if not self._prefix:
            raise SettingsError(f"FT_PUBLISH_TO={self._url!r} names a bucket alone.", "Write s3://bucket/prefix.")
        self._refuse_others()
        prove(self._store, self._prefix)

    def publish(self, repository: Path) -> dict[str, Any]:
        found, record = self._refuse_others()
        wanted = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
        change = update(
            self._url, record, found, wanted, lambda name: hashes(self._store.get(f"{self._prefix}/{name}"))
        )
        remember(repository, record)
        if change.kept:  # the manifest vouches for what is there
            repository = self._with_theirs(repository, change.kept)
        for name in change.removed:  # first, as the record that names them is replaced by what follows
            self._store.delete(f"{self._prefix}/{name}")
        self._store.upload(repository / RECORD, f"{self._prefix}/{RECORD}")  # from now on the place is this run's
        manifest.commit(self._store, self._prefix, repository, self._run.fingerprint("publish"))
        committed = manifest.read(self._store, self._prefix)
        assert committed is not None, "it was just committed"
        if change.kept:
            shutil.rmtree(repository)
        return {"destination": self._url, "sizes": {entry.path: entry.size for entry in committed.files}}

    def _with_theirs(self, repository: Path, names: frozenset[str]) -> Path:
        """A copy of the repository, by links where possible, with the files `names` as they are in the bucket."""
        copy = repository.with_name(f"{repository.name}-with-theirs")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(repository, copy, copy_function=durability.link)
        for name in names:
            (copy / name).unlink()
            self._store.download(f"{self._prefix}/{name}", copy / name)
        return copy

    def holds(self, record: dict[str, Any]) -> bool:
        found = {key.removeprefix(f"{self._prefix}/"): size for key, size in self._store.list(self._prefix)}
        return is_there(record.get("sizes") or {RECORD: 0}, found)

    def _refuse_others(self) -> tuple[set[str], bytes | None]:
        """What is there, and this run's record of it. Raises SettingsError if it is not this run's."""
        names = {key.removeprefix(f"{self._prefix}/") for key, _ in self._store.list(self._prefix)}
        # neither a killed start's proof, nor what consoles call a folder: an empty object whose key ends with a slash
        names = {name for name in names if not name.startswith("preflight-") and name and not name.endswith("/")}
        record = self._store.get(f"{self._prefix}/{RECORD}") if RECORD in names else None
        refuse_others(self._run, self._url, names, record, bare=frozenset())
        return names - {manifest.MANIFEST}, record
