"""Stage publish: merge/model, train/adapter, every report → a Hub repository, a bucket or a folder, publish/published.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from job.hub.layout import CURVE, lay_out
from job.hub.ownership import list_files
from job.hub.publish import destinations_of
from job.hub.to_folder import Folder
from job.hub.to_hub import HubRepository
from job.report.events import message, output
from job.report.model_card import Published
from job.run import Run, now, write_json
from job.stages.publish_adapter import add_tokenizer


def publish(run: Run) -> None:
    """Lay out the repository, put it where FT_PUBLISH_TO says, and record where that is."""
    destinations = destinations_of(run)
    named = next((place for place in destinations if isinstance(place, HubRepository)), None)
    what = Published(
        name=named.model_id if named is not None else None,
        revision=named.branch if named is not None else None,
        merged=run.settings.publish != "adapter",
        adapter=run.settings.publish != "merged",
    )
    repository = lay_out(run, what)
    if not what.merged:
        add_tokenizer(run, repository)
    list_files(repository)
    places: list[dict[str, Any]] = []
    # a folder takes the files away, unless another one follows
    folders = [place for place in destinations if isinstance(place, Folder)]
    for destination in sorted(destinations, key=lambda place: isinstance(place, Folder)):
        run.check_stop()
        last = not folders or destination is folders[-1]
        source = repository if last or destination not in folders else _copied(repository)
        if isinstance(destination, HubRepository):
            places.append(destination.publish(source, tag=run.id))
        else:
            places.append(destination.publish(source))
    order = [str(destination) for destination in destinations]
    places.sort(key=lambda place: order.index(place["destination"]) if place["destination"] in order else 0)
    write_json(run.paths.published_file, {"published": now(), **places[-1], "places": places})
    shutil.rmtree(repository, ignore_errors=True)
    for place in places:
        where = place.get("page", place["destination"])
        message(f"Published to {where}.")
        output("published", where)
        if (Path(where) / CURVE).is_file():
            output("loss curve", str(Path(where) / CURVE))


def _copied(repository: Path) -> Path:
    copy = repository.with_name(f"{repository.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(repository, copy)
    return copy
