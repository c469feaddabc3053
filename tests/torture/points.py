"""Where the job is killed: at random moments, and in the middle of chosen operations."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = ("preflight", "download", "prepare", "train", "sample", "merge", "publish")


@dataclass(frozen=True)
class Point:
    """Where to kill the job: at a random moment of a stage, or in the middle of a chosen operation."""

    name: str
    stage: str  # the stage during which it can happen
    process: str = ""
    event: str = ""
    match: str = ""
    skips: int = 0  # let up to this many such events pass first
    act: str = "kill"  # or `child`: kill a process of the stage alone; or `stop`: send SIGTERM


# The names of the audit events are Python's; the paths are the job's.
POINTS = (
    *(Point(f"{stage}, any moment", stage) for stage in STAGES),
    Point("train, any moment", "train"),  # the long stage gets several
    Point("train, any moment", "train"),
    Point("lease", "preflight", "supervisor", "os.rename", r"lease\.json", 2),
    Point("save begins", "train", "train", "os.mkdir", r"writing-\d+", 3),
    Point("save", "train", "train", "open", r"writing-\d+/", 6),
    Point("save ends", "train", "train", "os.rename", r"writing-\d+", 3),
    Point("hash or upload", "train", "supervisor", "open", r"checkpoints/checkpoint-\d+/", 20),
    Point("upload", "train", "supervisor", "open", r"store/.*step-\d+.*\.partial-", 16),
    Point("manifest put", "train", "supervisor", "os.link", r"step-\d+/.*MANIFEST", 3),
    Point("manifest put, a moment later", "train", "supervisor", "os.remove", r"step-\d+/.*MANIFEST\.json\.partial", 3),
    Point("retention", "train", "supervisor", "os.remove", r"store/.*step-\d+/.*/(?!.*partial)", 8),
    Point("restore", "train", "supervisor", "open", r"checkpoint-\d+\.partial-", 8),
    Point("restore ends", "train", "supervisor", "os.rename", r"checkpoint-\d+\.partial-", 0),
    Point("result of train committed", "train", "supervisor", "open", r"stages/train/", 5),
    Point("prepare marked", "prepare", "supervisor", "os.rename", r"/prepare/MANIFEST", 0),
    Point("sample committed", "sample", "supervisor", "os.link", r"stages/sample/.*MANIFEST", 0),
    Point("merge writes", "merge", "merge", "open", r"/merge/", 6),
    Point("merge marked", "merge", "supervisor", "os.rename", r"/merge/MANIFEST", 0),
    Point("publish lays out", "publish", "publish", "os.link", r"repository", 8),
    Point("publish swaps", "publish", "publish", "os.rename", r"published", 1),
    Point("publish committed", "publish", "supervisor", "os.link", r"stages/publish/.*MANIFEST", 0),
)
S3_POINTS = (
    *(Point(f"{stage}, any moment", stage) for stage in STAGES),
    Point("train, any moment", "train"),
    Point("S3: lease", "preflight", "supervisor", "http.client.send", r"PUT /bucket/.*lease\.json", 2),
    Point("S3: upload", "train", "supervisor", "http.client.send", r"PUT /bucket/.*step-\d+/.*safetensors", 9),
    Point("S3: manifest put", "train", "supervisor", "http.client.send", r"PUT /bucket/.*step-\d+/.*MANIFEST", 3),
    Point("S3: retention", "train", "supervisor", "http.client.send", r"DELETE /bucket/.*step-", 12),
    Point("S3: restore", "train", "supervisor", "http.client.send", r"GET /bucket/.*step-\d+/.*safetensors", 2),
    Point("S3: result of train", "train", "supervisor", "http.client.send", r"PUT /bucket/.*stages/train/", 4),
    Point("S3: publish committed", "publish", "supervisor", "http.client.send", r"PUT /bucket/.*stages/publish/", 1),
)

# Other things that happen to a job, at a random moment of a stage. A worker is killed alone; a stop leaves little time.
ACTS = (
    *(
        Point(f"{stage}, a process of it alone", stage, act="child")
        for stage in ("preflight", "prepare", "train", "sample", "merge")
    ),
    *(
        Point(f"{stage}, SIGTERM", stage, act="stop")
        for stage in ("download", "train", "train", "train", "sample", "publish")
    ),
)
