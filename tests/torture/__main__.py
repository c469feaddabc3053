"""Kill the job again and again, and check that it ends as if nothing had happened.

    python -m tests.torture --kills 200 --seed 1

Runs the whole job on a tiny model on the CPU. Each run is killed by SIGKILL several times: at random moments of each
stage, and in the middle of chosen file operations (saving, hashing, uploading, committing, restoring, merging,
publishing, taking the lease). Every second run keeps its store on a real S3 server behind a proxy that injects faults.

At the end the adapter, optimizer, generators, row order, loss curve and everything published must be bit-identical to
those of an uninterrupted run. The last line and the exit code say whether they are.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from job.checkpoints.lease import LeaseRecord
from job.checkpoints.manifest import MANIFEST, Manifest, Rejected, restore
from job.storage import Store, open_store
from tests.conftest import LIGHTHOUSE, OFFLINE, ROOT, forking, make_tiny_model, serve_s3, session_folder
from tests.fault_proxy import FaultProxy

STAGES = ("preflight", "download", "prepare", "train", "sample", "merge", "publish")
SAVE_STEPS, MAX_STEPS, RUN_ID = 3, 16, "tortured"
KILLS_OF_A_RUN = 12
FAULT_RATE = 0.05
_FINE = {0, 75, -signal.SIGKILL}


@dataclass(frozen=True)
class Point:
    """Where to kill the job: at a random moment of a stage, or in the middle of a chosen operation."""

    name: str
    stage: str  # the stage during which it can happen
    process: str = ""
    event: str = ""
    match: str = ""
    skips: int = 0  # let up to this many such events pass first


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


@dataclass
class Tally:
    """What happened over all runs. `over()` after enough kills, when time is up, or when something went wrong."""

    wanted: int
    until: float
    kills: Counter[str] = field(default_factory=Counter)
    resumes: int = 0
    lost_steps: dict[str, int] = field(default_factory=lambda: {"folder": 0, "s3": 0})  # the worst
    damaged_commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    ended_by_faults: int = 0
    complaints: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, uninterrupted
    runs: int = 0
    equal: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def over(self) -> bool:
        return sum(self.kills.values()) >= self.wanted or time.monotonic() > self.until or len(self.complaints) > 5


class TorturedRun:
    """One run of the job in its own folder, with as many starts as it takes."""

    def __init__(self, folder: Path, model: Path, tally: Tally, proxy: FaultProxy | None = None) -> None:
        self.folder, self.tally, self.proxy = folder, tally, proxy
        self.store_url = f"s3://bucket/{folder.name}" if proxy else str(folder / "results" / "store")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FT_")},
            "FT_MODEL_NAME": str(model), "FT_DATASET_NAME": str(LIGHTHOUSE), "FT_DATASET_SPLIT": "train[:40]", "FT_EVAL_SPLIT": "0.2",
            "FT_DEVICE": "cpu", "FT_LORA_R": "4", "FT_MAX_STEPS": str(MAX_STEPS), "FT_SAVE_STEPS": str(SAVE_STEPS), "FT_LOGGING_STEPS": "1",
            "FT_LEARNING_RATE": "1e-2", "FT_GRADIENT_ACCUMULATION_STEPS": "8", "FT_SAMPLE_MAX_NEW_TOKENS": "4", "FT_NEW_MODEL": "tortured",
            "FT_OUTPUT_DIR": str(folder / "results"), "FT_STORE_URL": self.store_url, "FT_RUN_ID": RUN_ID, "FT_LOG_FORMAT": "json",
            **OFFLINE, "HF_HOME": str(session_folder() / "hf-home"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent / "chaos"), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        if proxy:
            self.environment["AWS_ENDPOINT_URL"] = proxy.url
        self.complete: set[str] = set()
        self.stage, self.last_step = "preflight", 0

    def live(self, point: Point | None, chance: random.Random) -> int:
        """Start the job, which ends by itself or at `point`. Returns its exit code, -9 if it was killed there."""
        environment = dict(self.environment)
        if point is not None and point.event:
            skip = chance.randint(0, point.skips)
            environment["TORTURE_POINT"] = json.dumps(
                {"process": point.process, "event": point.event, "match": point.match, "skip": skip}
            )
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py")],
            env=forking(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            self._follow(json.loads(line), process, point, chance)
        errors = process.stderr.read()
        code = process.wait()
        if code not in _FINE:
            self._complain(f"exit code {code} after {point.name if point else 'no kill'}: {errors[-1500:]}")
        return code

    def _follow(
        self, event: dict[str, Any], process: subprocess.Popen[str], point: Point | None, chance: random.Random
    ) -> None:
        match event:
            case {"event": "stage_started", "stage": stage} if point and not point.event and stage == point.stage:
                self.stage = stage
                seconds = chance.uniform(0, self.tally.seconds[stage])
                threading.Timer(seconds, process.kill).start()  # the stage's process dies with its parent
            case {"event": "stage_started", "stage": stage}:
                self.stage = stage
            case {"event": "stage_ended", "stage": stage, "result": "done", "seconds": seconds}:
                self.complete.add(stage)
                self.tally.seconds.setdefault(stage, seconds)
            case {"event": "progress", "stage": "train", "done": done}:
                self.last_step = int(done)
            case {"message": str(text), "step": step} if text.startswith("Resuming from"):
                with self.tally.lock:
                    self.tally.resumes += 1
                    store = "s3" if self.proxy else "folder"
                    self.tally.lost_steps[store] = max(self.tally.lost_steps[store], self.last_step - int(step))

    def audit(self) -> None:
        """Check that every commit that counts is intact. It must be at any moment."""
        store = self.open_store()
        try:
            record = LeaseRecord(**_json(store.get(f"{RUN_ID}/lease.json")))
        except FileNotFoundError:
            return
        for key, _ in list(store.list(RUN_ID)):
            folder = key.removeprefix(f"{RUN_ID}/").removesuffix(f"/{MANIFEST}")
            if not key.endswith(MANIFEST) or not _counts(folder, record):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    restore(store, f"{RUN_ID}/{folder}", Path(scratch) / "it")
                except Rejected as reason:
                    self._complain(f"a commit that counts is damaged: {reason}")
                    with self.tally.lock:
                        self.tally.damaged_commits += 1

    def open_store(self) -> Store:
        """The store, without the proxy's faults."""
        if self.proxy:
            os.environ["AWS_ENDPOINT_URL"] = f"http://{self.proxy.upstream}"
        return open_store(self.store_url)

    def outcome(self) -> dict[str, Any]:
        """What must not depend on how often the run was killed: hashes of all it produced, and the loss curve."""
        store, found = self.open_store(), {}
        with tempfile.TemporaryDirectory() as scratch:
            folders = {key.removesuffix(f"/{MANIFEST}") for key, _ in store.list(RUN_ID) if key.endswith(MANIFEST)}
            newest = max(folder for folder in folders if "/checkpoints/" in folder)
            for label, prefix in {
                "checkpoint": newest,
                "train": max(f for f in folders if "stages/train" in f),
            }.items():
                restore(store, prefix, Path(scratch) / label)
            for path in Path(scratch).rglob("*.safetensors"):
                found[path.relative_to(scratch).as_posix()] = _hash(path)
            state = _json((Path(scratch) / "checkpoint" / "trainer_state.json").read_bytes())
            metrics = _json((Path(scratch) / "train" / "metrics.json").read_bytes())
        clock = ("runtime", "per_second", "total_flos")
        found["steps"] = state["global_step"]
        found["loss curve"] = [
            {name: value for name, value in entry.items() if not any(part in name for part in clock)}
            for entry in state["log_history"]
        ]
        found["order of rows"] = metrics["row_order_sha256"]
        published = self.folder / "results" / "published" / "tortured"
        return found | {
            f"published/{path.relative_to(published).as_posix()}": _hash(path)
            for path in published.rglob("*")
            if path.is_file()
        }

    def _complain(self, text: str) -> None:
        with self.tally.lock:
            self.tally.complaints.append(f"{self.folder.name}: {text}")


def torture(
    run: TorturedRun, kills: int, seed: int, expected: dict[str, Any] | None, control: str | None = None
) -> dict[str, Any]:
    """Kill the run up to `kills` times, let it finish, and compare the outcome."""
    chance, killed = random.Random(seed), 0
    choices = S3_POINTS if run.proxy else POINTS
    if run.proxy:
        run.proxy.rate = FAULT_RATE
    plan = sorted(chance.choices(choices, k=kills), key=lambda point: STAGES.index(point.stage))
    while plan and not run.tally.over():
        point = plan.pop(0)
        if point.stage in run.complete:
            continue
        code = run.live(point, chance)
        if code == -signal.SIGKILL:
            killed += 1
            with run.tally.lock:
                run.tally.kills[point.name if point.event else f"{run.stage}, any moment"] += 1
        elif code == 75:
            with run.tally.lock:
                run.tally.ended_by_faults += 1
        elif code == 0:
            break
        run.audit()
        if control:
            _tamper(run, control)
    for _ in range(8):
        code = run.live(None, chance)
        if code == 0:
            break
        if run.proxy:
            run.tally.ended_by_faults += 1
            run.proxy.rate /= 2  # a store that fails forever does not test resuming
    found = run.outcome() if code == 0 else {"exit code": code}
    with run.tally.lock:
        run.tally.runs += 1
        if expected is not None:
            differing = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            run.tally.equal += not differing
            if differing:
                run.tally.complaints.append(
                    f"{run.folder.name}: differs from the uninterrupted run: {', '.join(differing)}"
                )
        if run.proxy:
            run.tally.faults += run.proxy.injected
    return found


def _tamper(run: TorturedRun, control: str) -> None:
    """Simulate a resume that forgets the generators or the position in the data."""
    import torch

    from job.training.state import load_tree, save_tree

    manifests = sorted(Path(run.store_url).glob(f"{RUN_ID}/checkpoints/*/*/{MANIFEST}"))
    if not manifests:
        return
    folder = manifests[-1].parent
    state = load_tree(folder / "process-0.safetensors")
    other = torch.Generator().manual_seed(7).get_state()
    if control == "rng":
        state["generators"]["torch"] = other
    else:
        state["data_order"] |= {"batches": 0, "generator": other}
    save_tree(state, folder / "process-0.safetensors")
    fingerprint = _json(manifests[-1].read_bytes())["fingerprint"]
    manifests[-1].write_bytes(Manifest.of(folder, fingerprint).to_bytes())


def _counts(folder: str, record: LeaseRecord) -> bool:
    return folder in record.inherited or folder.endswith(f"/attempt-{record.attempt:04d}")


def _json(data: bytes) -> Any:
    return json.loads(data)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=600, help="stop killing after this long")
    parser.add_argument("--store", choices=("both", "folder", "s3"), default="both")
    parser.add_argument(
        "--control", choices=("rng", "data"), help="drop this from every checkpoint: the comparison must fail"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    tally = Tally(wanted=arguments.kills, until=began + 60 * arguments.minutes)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        model = make_tiny_model(top / "model")
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        upstream = stack.enter_context(serve_s3(_folder(top, "s3"))) if arguments.store != "folder" else ""
        undisturbed = TorturedRun(_folder(top, "undisturbed"), model, tally)
        expected = torture(undisturbed, 0, 0, None)
        print(f"uninterrupted run: {time.monotonic() - began:.0f} s", flush=True)
        if "exit code" in expected:
            print("\n".join(tally.complaints))
            return 1
        tally.runs = 0

        def one(number: int) -> None:
            s3 = arguments.store == "s3" or (arguments.store == "both" and number % 2 == 1)
            run_seed = arguments.seed * 10_000 + number
            proxy = stack.enter_context(FaultProxy(upstream, seed=run_seed)) if s3 else None
            run = TorturedRun(_folder(top, f"run-{number}"), model, tally, proxy)
            torture(run, KILLS_OF_A_RUN, run_seed, expected, arguments.control)
            print(f"run {number}: {sum(tally.kills.values())} of {arguments.kills} kills", flush=True)
            shutil.rmtree(run.folder, ignore_errors=True)

        numbers = itertools.count()

        def work(_: int) -> None:
            while not tally.over():
                one(next(numbers))

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(work, range(arguments.jobs)))
    return _report(tally, arguments, time.monotonic() - began)


def _report(tally: Tally, arguments: argparse.Namespace, seconds: float) -> int:
    for name, count in sorted(tally.kills.items()):
        print(f"  killed at {name}: {count}")
    for name, count in sorted(tally.faults.items()):
        print(f"  fault {name}: {count}")
    print("\n".join(tally.complaints))
    good = tally.equal == tally.runs and not tally.complaints
    print(
        f"seed {arguments.seed}: {sum(tally.kills.values())} kills in {tally.runs} runs, {tally.resumes} resumes, "
        f"{sum(tally.faults.values())} faults ({tally.ended_by_faults} starts ended by them), "
        f"{tally.damaged_commits} corrupt checkpoints, at most {tally.lost_steps['folder']} steps lost "
        f"({tally.lost_steps['s3']} on S3 with faults) at one save per {SAVE_STEPS} steps, "
        f"final hashes equal in {tally.equal} of {tally.runs} runs, {seconds:.0f} s: {'PASSED' if good else 'FAILED'}"
    )
    return 0 if good else 1


def _folder(top: Path, name: str) -> Path:
    (top / name).mkdir()
    return top / name


if __name__ == "__main__":
    sys.exit(main())
