"""The job, top to bottom. Each stage is the function NAME in the file NAME.py."""

from __future__ import annotations

from dataclasses import dataclass

from job.guard.secrets import AWS, HUB, WANDB


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the supervisor knows about a stage without importing it.

    `needs` are the stages whose files it reads. Its process starts together with the stage `starts_with` and waits for
    its turn, so that its imports take no extra time. A `kept` stage's folder is committed to the store, so that its
    result outlives this machine. A `per_gpu` stage runs one process per GPU. An `online` stage may use the network. The
    files of a `hashed_behind` stage are hashed while the next stage runs, and count only after that. A `resumable` stage
    finds what an interrupted start left. `secrets` are the variables that its process may see.
    """

    name: str
    needs: tuple[str, ...] = ()
    starts_with: str | None = None
    kept: bool = False
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
    Stage(name="prepare", starts_with="preflight", needs=("download",), hashed_behind=True),
    # Trains with QLoRA and TRL's SFTTrainer, one process per GPU.
    Stage(
        name="train",
        starts_with="preflight",
        needs=("download", "prepare"),
        kept=True,
        per_gpu=True,
        secrets=WANDB,
    ),
    # Answers the prompts with the base model and with the tuned one.
    Stage(name="sample", needs=("download", "prepare", "train"), kept=True),
    # Merges the adapter into the base model, reads the result back and compares it with the trained model.
    Stage(name="merge", starts_with="sample", needs=("download", "prepare", "train")),
    # Publishes merged model, adapter and model card to the Hub or a folder.
    Stage(
        name="publish", needs=("download", "prepare", "train", "sample", "merge"), kept=True, online=True, secrets=HUB
    ),
)
