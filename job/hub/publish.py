"""Where a finished model is published. To add a destination, write a file with these methods and add a line to `_of`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from job.hub.to_folder import Folder
from job.hub.to_hub import HubRepository
from job.hub.to_store import Bucket
from job.run import Run
from job.storage import scheme_of


class Destination(Protocol):
    """A place for the result. `str()` of it is what the run's record and the closing table say."""

    def check(self) -> None:
        """Raise now if publishing will not be allowed, or would replace what others published. Hours of training follow."""

    def publish(self, repository: Path) -> dict[str, Any]:
        """Put the folder there, whole or not at all, and return what the run's record needs to find it again."""

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether what `publish` recorded is still there."""


def destinations_of(run: Run) -> list[Destination]:
    """Where FT_PUBLISH_TO says. If it says nothing: a folder on this disk, and the store if that is not on this disk."""
    if run.settings.destinations:
        return [_of(run, target) for target in run.settings.destinations]
    here = run.paths.output_dir / "published" / run.settings.new_model_name
    folder = Folder(run, here, otherwise=here.with_name(f"{here.name}-{run.id}"))
    return [folder, *([Bucket(run, f"{run.store.url}/{run.id}/published")] if survives(run) else [])]


def survives(run: Run) -> bool:
    """Whether the store is elsewhere, so that what is in it outlives this machine's disk."""
    return scheme_of(run.store.url) not in ("", "file")


def still_there(run: Run, record: dict[str, Any]) -> bool:
    """Whether what the run recorded as published is still where it was put.

    Without FT_PUBLISH_TO one copy is enough, since a disk may be gone with its machine.
    """
    places = record.get("places", [record])
    held = (_of(run, place["destination"]).holds(place) for place in places)
    return all(held) if run.settings.destinations else any(held)


def _of(run: Run, target: str) -> Destination:
    match scheme_of(target):
        case "hf":
            return HubRepository(run, target.partition("://")[2].strip("/"))
        case "":
            return Folder(run, Path(target).expanduser().absolute())
        case _:
            return Bucket(run, target)
