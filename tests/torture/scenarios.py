"""What kinds of run are tortured: each has its own settings, its own undisturbed run to compare with, and its own dangers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.torture.points import ACTS, POINTS, S3_POINTS, Point

_ANYWHERE = tuple(point for point in POINTS if not point.event)
_IN_TRAINING = tuple(point for point in (*POINTS, *ACTS) if point.stage == "train")
_STOPS = tuple(point for point in ACTS if point.act == "stop" and point.stage == "train")


@dataclass(frozen=True)
class Scenario:
    """A kind of run.

    `store` is `folder`, `s3` (behind a proxy that injects faults), or `elsewhere` (a folder that survives when the machine
    is another one at each start). `sources` are where the model and the dataset come from. `disturbance` happens during
    starts, besides what `points` do: `disk` makes writes fail, `clock` sets the clock back and forth by ten minutes.
    """

    name: str
    points: tuple[Point, ...] = (*POINTS, *ACTS)
    settings: Mapping[str, str] = field(default_factory=dict)
    store: str = "folder"
    sources: str = "folder"
    disturbance: str = ""
    rows: int = 40
    forks: bool = True


SCENARIOS = (
    Scenario("folder"),
    Scenario("s3", S3_POINTS, store="s3"),
    Scenario("another machine each time", _ANYWHERE, store="elsewhere"),
    Scenario("sources on S3", (*S3_POINTS, *ACTS), store="s3", sources="s3"),
    Scenario("from the Hub to the Hub", (*_ANYWHERE, *ACTS), sources="hub"),
    Scenario("saves at the pace of the store", _IN_TRAINING, {"FT_SAVE_STEPS": "auto"}),
    Scenario(
        "evaluations longer than a stop leaves time",
        (*_IN_TRAINING, *_STOPS, *_STOPS, *_STOPS),
        {
            "FT_EVAL_SPLIT": "0.5",
            "FT_EVAL_STEPS": "4",
            "FT_PER_DEVICE_EVAL_BATCH_SIZE": "1",
            "FT_STOP_GRACE_SECONDS": "8",
            "FT_SAVE_STEPS": "1000",
        },
        rows=240,
    ),
    Scenario(
        "early stopping", _IN_TRAINING, {"FT_EVAL_STEPS": "2", "FT_EARLY_STOPPING_PATIENCE": "2", "FT_SAVE_STEPS": "2"}
    ),
    Scenario(
        "two ranks", (*_IN_TRAINING, *_ANYWHERE), {"FT_NPROC_PER_NODE": "2", "FT_GRADIENT_ACCUMULATION_STEPS": "4"}
    ),
    Scenario("a disk that fails", _ANYWHERE, disturbance="disk"),
    Scenario("a clock that jumps", (*_ANYWHERE, *_STOPS), disturbance="clock"),
    Scenario(
        "two workers prepare 12,000 rows",
        tuple(point for point in (*_ANYWHERE, *ACTS) if point.stage == "prepare"),
        {"FT_DATASET_SPLIT": "train"},
        rows=12_000,
        forks=False,
    ),
)
