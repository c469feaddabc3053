"""A first look at the data: what would be trained on, before a GPU is rented or a model is downloaded."""

from __future__ import annotations

import shutil

from job.report.console import Console
from job.run import Run
from job.supervision.supervisor import Supervisor


def look_at_data(run: Run, console: Console) -> None:
    """Download the data and the model's tokenizer, prepare the data, and say where the report is.

    `run` is one of its own, of which nothing is kept for the next time but what was downloaded. Raises what a run with
    these settings would raise.
    """
    for earlier in (run.paths.stage_dir("prepare"), run.paths.output_dir / "store"):
        shutil.rmtree(earlier, ignore_errors=True)
    console.say(f"The report of the data will be at {run.paths.data_page_file}.")
    Supervisor(run, console).supervise()
    console.say(f"Nothing was trained. Open {run.paths.data_page_file} in a browser.")
