"""The job, top to bottom. Each stage is the function NAME in the file NAME.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from job.guard.secrets import AWS, HUB, WANDB
from job.settings import STAGE_NAMES, Settings


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the supervisor knows about a stage without importing it.

    `needs` are the stages whose files it reads. Its process starts together with the stage `starts_with` and waits for
    its turn, so that its imports take no extra time. A `kept` stage's folder is committed to the store, so that its
    result outlives this machine. A `shared` stage's folder is stored too, while the next stage runs and if the store takes
    it, so that another machine with the same inputs need not make it again. A `per_gpu` stage runs one process per GPU. An `online` stage may use the network. The
    files of a `hashed_behind` stage are hashed while the next stage runs, and count only after that. A `resumable` stage
    finds what an interrupted start left. `secrets` are the variables that its process may see.
    """

    name: str
    needs: tuple[str, ...] = ()
    starts_with: str | None = None
    kept: bool = False
    shared: bool = False
    per_gpu: bool = False
    online: bool = False
    hashed_behind: bool = False
    resumable: bool = False
    secrets: tuple[str, ...] = ()


STAGES = (
    # Checks the machine, the sources, the store and the destination, so that what can fail fails now.
    Stage(name="preflight", online=True, secrets=HUB + AWS),
    # Fetches model and datasets from the Hub, a folder or S3, each at a recorded commit.
    Stage(
        name="download",
        starts_with="preflight",
        online=True,
        hashed_behind=True,
        resumable=True,
        secrets=HUB + AWS,
    ),
    # Turns rows into tokens and labels, once, as Arrow.
    Stage(name="prepare", starts_with="preflight", needs=("download",), hashed_behind=True, shared=True),
    # Trains with QLoRA and TRL's SFTTrainer, one process per GPU.
    Stage(
        name="train",
        starts_with="preflight",
        needs=("download", "prepare"),
        kept=True,
        per_gpu=True,
        secrets=WANDB,
    ),
    # Publishes the adapter to a branch of the Hub repository, before anything later can fail.
    Stage(name="publish_adapter", needs=("download", "prepare", "train"), kept=True, online=True, secrets=HUB),
    # Answers the prompts with the base model and with the tuned one.
    Stage(name="sample", needs=("download", "prepare", "train"), kept=True),
    # Merges the adapter into the base model, reads the result back and compares it with the trained model.
    Stage(name="merge", starts_with="sample", needs=("download", "prepare", "train")),
    # Writes the merged model in other formats, loads each and compares it with the merged model.
    Stage(name="export", needs=("download", "prepare", "merge")),
    # Publishes merged model, adapter and model card to the Hub, a bucket or a folder.
    Stage(
        name="publish",
        needs=("download", "prepare", "train", "sample", "merge", "export"),
        kept=True,
        online=True,
        secrets=HUB + AWS,
    ),
)


def stages_of(settings: Settings) -> tuple[Stage, ...]:
    """The stages that these settings can need, in order. What a setting leaves out is needed by none."""
    without = set()
    if not settings.publishes_adapter_first:
        without.add("publish_adapter")
    if not settings.export:
        without.add("export")
    if settings.publish == "adapter":
        without.add("export")
        if settings.stages == STAGE_NAMES:
            without.add("merge")
    unneeded = {"merge", "export"} if settings.publish == "adapter" else without
    return tuple(
        replace(stage, needs=tuple(name for name in stage.needs if name not in unneeded))
        if stage.name == "publish"
        else stage
        for stage in STAGES
        if stage.name not in without
    )
