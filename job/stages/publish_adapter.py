"""Stage publish_adapter: train/adapter → a branch of the Hub repository, publish_adapter/published.json.

A run that cannot be merged, or whose machine is gone for good, has its adapter where it was to go.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from job.errors import PermissionRefused, SettingsError, TransientError
from job.hub.layout import lay_out
from job.hub.ownership import list_files
from job.hub.publish import destinations_of
from job.hub.to_hub import HubRepository
from job.report.events import message
from job.report.model_card import Published
from job.run import Run, now, write_json


def publish_adapter(run: Run) -> None:
    """Push the adapter to a branch beside that of the model. If the Hub does not take it, that is told and nothing more.

    What was trained is in the store, and can be sampled and merged meanwhile.
    """
    places = []
    for destination in destinations_of(run):
        if not isinstance(destination, HubRepository):
            continue
        branch = destination.for_the_adapter()
        repository = lay_out(run, Published(branch.model_id, revision=branch.branch, merged=False, adapter=True))
        add_tokenizer(run, repository)
        list_files(repository)
        try:
            places.append(branch.publish(repository))
        except (TransientError, PermissionRefused, SettingsError) as error:
            message(
                f"The adapter was not published yet: {error.message} {error.hint} The stage publish will try again.",
                "warning",
            )
        else:
            message(f"Published the adapter to {places[-1]['page']}.")
        shutil.rmtree(repository, ignore_errors=True)
    write_json(run.paths.adapter_published_file, {"published": now(), "places": places})


def add_tokenizer(run: Run, repository: Path) -> None:
    """The tokenizer that the adapter was trained with, for a repository that has no merged model."""
    from job.data.tokenizer_files import publish_tokenizer  # imports transformers, which takes seconds

    publish_tokenizer(run.paths.model_dir, run.paths.tokenizer_dir, repository)
