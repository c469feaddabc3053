"""The job, top to bottom. Each stage is the function of its own name in the file of its own name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What the supervisor knows of a stage without importing it.

    `needs` are the stages whose files it reads. Its process is started when the stage `starts_with` begins, so that its imports
    cost no time of their own, and waits for its turn. A `kept` stage's folder is committed to the store, so that its result
    outlives this machine. Files that are `hashed_behind` count only some time after their stage has ended, and the next one begins
    meanwhile. A `resumable` stage finds what an interrupted start of it left. `secrets` are the variables that its process may see.
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


_HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")

STAGES = (
    # Checks the machine, the sources, the store and the destination, so that what can fail fails now.
    Stage(name="preflight", online=True, secrets=_HUB + _AWS),
    # Model and datasets from the Hub, a folder or S3, each at a recorded commit.
    Stage(
        name="download",
        starts_with="preflight",
        online=True,
        hashed_behind=True,
        resumable=True,
        secrets=_HUB + _AWS,
    ),
    # Rows to tokens and labels, once, as Arrow.
    Stage(name="prepare", starts_with="preflight", needs=("download",), hashed_behind=True),
    # QLoRA with TRL's SFTTrainer; one process per GPU.
    Stage(
        name="train",
        starts_with="preflight",
        needs=("download", "prepare"),
        kept=True,
        per_gpu=True,
        secrets=("WANDB_API_KEY",),
    ),
    # The prompts, answered before and after.
    Stage(name="sample", needs=("download", "prepare", "train"), kept=True),
    # Adapter into base, read back and compared with what was trained.
    Stage(name="merge", starts_with="sample", needs=("download", "prepare", "train")),
    # Merged model, adapter and model card to the Hub or a folder.
    Stage(
        name="publish", needs=("download", "prepare", "train", "sample", "merge"), kept=True, online=True, secrets=_HUB
    ),
)
