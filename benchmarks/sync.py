"""How fast checkpoints are stored, compared with s5cmd, and how much that slows the training.

    python benchmarks/sync.py throughput --s5cmd PATH [--endpoint URL] [--mib 1024] [--runs 3]
    FT_MODEL_NAME=… FT_DATASET_NAME=… python benchmarks/sync.py steps [--slow 10] [--steps 300] [--save-steps 20]

`throughput` stores one checkpoint folder on an S3 server, alternating between our code and s5cmd. Our time includes the
hashes and the manifest.

`steps` trains twice with the same saves: once without syncing them, and once under the supervisor, with the store
slowed to a tenth of its speed. It compares the step times in the trainer's TensorBoard log, and reports the
supervisor's peak memory and the most checkpoints on the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job.checkpoints.manifest import commit  # noqa: E402
from job.storage import open_store  # noqa: E402
from tests.conftest import serve_s3  # noqa: E402
from tests.fault_proxy import FaultProxy  # noqa: E402

_AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def a_checkpoint(folder: Path, mib: int) -> Path:
    """Write random bytes in the proportions of an adapter and its two optimizer moments."""
    folder.mkdir()
    for name, share in {"adapter_model.safetensors": 0.2, "optimizer.safetensors": 0.8}.items():
        with (folder / name).open("wb") as file:
            for _ in range(round(mib * share)):
                file.write(os.urandom(2**20))
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    return folder


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def throughput(arguments: argparse.Namespace, scratch: Path) -> None:
    folder = a_checkpoint(scratch / "checkpoint", arguments.mib)
    (scratch / "s3").mkdir()
    with contextlib.nullcontext(arguments.endpoint) if arguments.endpoint else serve_s3(scratch / "s3") as url:
        os.environ |= {**_AWS, "AWS_ENDPOINT_URL": url}
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(arguments.runs + 1):
            store = open_store(f"s3://bucket/{uuid.uuid4().hex}")
            ours.append(timed(lambda store=store: commit(store, "checkpoint", folder, "f")))
            command = [arguments.s5cmd, "--endpoint-url", url, "cp", f"{folder}/", f"s3://bucket/{uuid.uuid4().hex}/"]
            theirs.append(timed(lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)))
            _empty(store)
    print(json.dumps({"ours, seconds": ours[1:], "s5cmd, seconds": theirs[1:], "the first of each is left out": True}))
    ratio = statistics.median(theirs[1:]) / statistics.median(ours[1:])
    print(f"{arguments.mib} MiB: ours {arguments.mib / statistics.median(ours[1:]):.0f} MiB/s, {ratio:.2f} × s5cmd")


def _empty(store: object) -> None:
    client = store.client  # type: ignore[attr-defined]
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket="bucket", Key=item["Key"])


def steps(arguments: argparse.Namespace, scratch: Path) -> None:
    (scratch / "s3").mkdir()
    with serve_s3(scratch / "s3") as url:
        probe = a_checkpoint(scratch / "probe", 64)
        os.environ |= {**_AWS, "AWS_ENDPOINT_URL": url}
        rate = 64 * 2**20 / timed(lambda: commit(open_store("s3://bucket/probe"), "checkpoint", probe, "f"))
        with FaultProxy(url, bytes_per_second=rate / arguments.slow) as proxy:
            settings = {
                **os.environ, "FT_OUTPUT_DIR": str(scratch / "results"), "FT_RUN_ID": "sync", "FT_MAX_STEPS": str(arguments.steps),
                "FT_SAVE_STEPS": str(arguments.save_steps), "FT_LOGGING_STEPS": "1", "FT_LOG_FORMAT": "json", "FT_LOG_LEVEL": "debug",
                "FT_STORE_URL": "s3://bucket/steps",
            }  # fmt: skip
            run_folder = scratch / "results" / "runs" / "sync"
            subprocess.run(
                _command(),
                env=settings | {"FT_STAGES": "preflight,download,prepare"},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found: dict[str, list[dict[int, float]]] = {"nobody": [], "syncer": []}
            for _ in range(arguments.rounds):
                shutil.rmtree(run_folder / "tensorboard", ignore_errors=True)
                shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
                stage = [sys.executable, "-m", "job.stages", "train"]
                alone = {**settings, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
                subprocess.run(stage, env=alone, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found["nobody"].append(step_seconds(run_folder))
                shutil.rmtree(run_folder)
                settings |= {"FT_STORE_URL": f"s3://bucket/{uuid.uuid4().hex}", "AWS_ENDPOINT_URL": proxy.url}
                report = supervised(settings, run_folder)
                found["syncer"].append(step_seconds(run_folder))
    print(json.dumps({"store, MiB/s": round(rate / arguments.slow / 2**20, 1), **report}))
    for label, leave_out in {"all steps": False, "steps without a save": True}.items():
        summary = {
            who: quantiles([
                seconds for times in runs for step, seconds in times.items()
                if not (leave_out and (step - 1) % arguments.save_steps == 0)
            ])
            for who, runs in found.items()
        }  # fmt: skip
        change = summary["syncer"]["p99"] / summary["nobody"]["p99"] - 1
        print(json.dumps({label: summary, "p99 changes by": f"{change:+.1%}"}))


def supervised(settings: dict[str, str], run_folder: Path) -> dict[str, object]:
    """Train under the supervisor. Returns how many checkpoints it stored, and its memory and disk use."""
    process = subprocess.Popen(_command(), env=settings | {"FT_STAGES": "train"}, stdout=subprocess.PIPE, text=True)
    most, memory, stored = [0], [0], 0

    def watch() -> None:
        while process.poll() is None:
            most[0] = max(most[0], len(list((run_folder / "checkpoints").glob("*"))))
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                memory[0] = int(status.split("VmHWM:")[1].split()[0])
            except (OSError, IndexError):
                pass
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    for line in process.stdout:
        stored += bool(json.loads(line).get("committed"))
    if process.wait() != 0:
        raise SystemExit(f"the job ended with exit code {process.returncode}")
    return {"stored": stored, "most folders on the disk": most[0], "supervisor's peak, MiB": memory[0] // 1024}


def step_seconds(run_folder: Path) -> dict[int, float]:
    """Step → seconds since the previous step, by the trainer's clock, without the first few, which warm up."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    points = {event.step: event.wall_time for event in log.Scalars("train/loss")}
    return {step: points[step] - points[step - 1] for step in sorted(points) if step - 1 in points and step > 10}


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"median": round(cuts[49], 4), "p99": round(cuts[98], 4), "steps": len(seconds)}


def _command() -> list[str]:
    return [sys.executable, str(ROOT / "entrypoint.py")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("throughput")
    speed.add_argument("--s5cmd", required=True)
    speed.add_argument("--endpoint", help="an S3 server with a bucket named bucket (default: ministack)")
    speed.add_argument("--mib", type=int, default=1024)
    speed.add_argument("--runs", type=int, default=3)
    felt = commands.add_parser("steps")
    felt.add_argument("--slow", type=float, default=10)
    felt.add_argument("--steps", type=int, default=300)
    felt.add_argument("--save-steps", type=int, default=20)
    felt.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        (throughput if arguments.command == "throughput" else steps)(arguments, Path(scratch))


if __name__ == "__main__":
    main()
