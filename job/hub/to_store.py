"""Publishes below an `s3://` prefix, through the store: files, then a manifest that vouches for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.checkpoints import manifest
from job.errors import SettingsError
from job.hub.ownership import RECORD, refuse_others
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
        self._refuse_others()
        self._store.upload(repository / RECORD, f"{self._prefix}/{RECORD}")  # from now on the place is this run's
        manifest.commit(self._store, self._prefix, repository, self._run.fingerprint("publish"))
        found = manifest.read(self._store, self._prefix)
        assert found is not None, "it was just committed"
        wanted = {f"{self._prefix}/{entry.path}" for entry in found.files} | {f"{self._prefix}/{manifest.MANIFEST}"}
        for key, _ in list(self._store.list(self._prefix)):
            if key not in wanted:  # of an earlier publication by this run
                self._store.delete(key)
        return {"destination": self._url, "sizes": {entry.path: entry.size for entry in found.files}}

    def holds(self, record: dict[str, Any]) -> bool:
        found = {key.removeprefix(f"{self._prefix}/"): size for key, size in self._store.list(self._prefix)}
        wanted = record.get("sizes") or {RECORD: None}
        return all(name in found and size in (None, found[name]) for name, size in wanted.items())

    def _refuse_others(self) -> None:
        names = {key.removeprefix(f"{self._prefix}/") for key, _ in self._store.list(self._prefix)}
        names = {name for name in names if not name.startswith("preflight-")}  # a killed start's
        record = self._store.get(f"{self._prefix}/{RECORD}") if RECORD in names else None
        refuse_others(self._run, self._url, names, record, bare=frozenset())
