"""Real processes, stopped, suspended, starved and refused: little is lost, and the next start resumes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Job, contents, finished, published, read_until

GRACE_SECONDS = 20
WORKERS = json.dumps({"dataloader_num_workers": 2})
ADAPTER = "adapter/adapter_model.safetensors"


def tree_of(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                found += map(int, listing.read_text(encoding="ascii").split())
    return found


def signal_tree(pid: int, number: int) -> None:
    for process in reversed(tree_of(pid)):
        os.kill(process, number)


def resumed_step(events: list[dict[str, Any]]) -> int:
    return next(int(event["step"]) for event in events if event.get("message", "").startswith("Resuming from"))


def progress_of(events: list[dict[str, Any]]) -> int:
    steps = [event["done"] for event in events if event.get("event") == "progress" and event.get("stage") == "train"]
    return max(map(int, steps), default=0)


@pytest.mark.xdist_group("uninterrupted")
def test_a_stop_at_a_random_moment_of_each_stage_finishes_in_time_and_the_run_ends_as_if_undisturbed(
    job: Job,
    uninterrupted: Job,
) -> None:
    chance = random.Random(11)
    job.environment |= {
        "FT_STOP_GRACE_SECONDS": str(GRACE_SECONDS), "FT_EXTRA_TRAINING_ARGS": WORKERS, "FT_SAVE_STEPS": "1000",
    }  # fmt: skip
    for stage in ("preflight", "download", "prepare", "train", "sample", "merge", "publish"):
        process = job.start()
        read_until(process, event="stage_started", stage=stage)
        time.sleep(chance.uniform(0, 0.3))  # the shortest stage takes half a second
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        result = finished(process, *process.communicate(timeout=120))
        assert result.code == 75, f"{stage}: {result.code} {result.stderr}"
        assert time.monotonic() - asked < GRACE_SECONDS, stage
    process = job.start(FT_STAGES="train")  # train was complete before sample was stopped
    assert finished(process, *process.communicate(timeout=120)).ended["train"] == "skipped"
    assert job.run().code == 0
    assert contents(published(job))[ADAPTER] == contents(published(uninterrupted))[ADAPTER]


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.slow
def test_a_signal_to_every_process_during_training_loses_no_finished_step(
    job: Job, tmp_path: Path, processes: str
) -> None:
    """As with `scancel` or a terminal, torchrun, its ranks and their data workers get the signal too."""
    job.forks = False
    job.environment |= {
        "FT_NPROC_PER_NODE": processes, "FT_STAGES": "train", "FT_EXTRA_TRAINING_ARGS": WORKERS, "FT_SAVE_STEPS": "1000",
        "FT_STOP_GRACE_SECONDS": str(GRACE_SECONDS), "FT_MAX_STEPS": "30",
    }  # fmt: skip
    process = job.start()
    read_until(process, event="progress", stage="train", done=4)
    signal_tree(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    stopped = finished(process, *process.communicate(timeout=120))
    assert stopped.code == 75, stopped.stderr
    assert time.monotonic() - asked < GRACE_SECONDS
    again = job.run()
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) >= max(4, progress_of(stopped.events))
    straight = job.run(FT_OUTPUT_DIR=str(tmp_path / "straight"))
    assert straight.code == 0, straight.stderr
    adapter = Path("runs/test-run/train") / ADAPTER
    assert (Path(job.environment["FT_OUTPUT_DIR"]) / adapter).read_bytes() == (
        tmp_path / "straight" / adapter
    ).read_bytes()


@pytest.mark.xdist_group("uninterrupted")
@pytest.mark.slow
def test_exactly_one_of_a_suspended_job_and_its_replacement_can_commit(
    job: Job,
    uninterrupted: Job,
    tmp_path: Path,
) -> None:
    """A node is thought dead, its job is started elsewhere, and the node comes back."""
    job.forks = False
    job.environment |= {"FT_STORE_URL": str(tmp_path / "store"), "FT_SAVE_STEPS": "1"}
    old = job.start(FT_OUTPUT_DIR=str(tmp_path / "old machine"))
    read_until(old, event="progress", stage="train", done=3)
    signal_tree(old.pid, signal.SIGSTOP)
    new = job.start()
    read_until(new, event="stage_started", stage="train")
    signal_tree(old.pid, signal.SIGCONT)
    woken = finished(old, *old.communicate(timeout=120))
    assert woken.code == 75, woken.stderr
    assert "Attempt 2 of run 'test-run'" in woken.error["message"]
    replacement = finished(new, *new.communicate(timeout=300))
    assert replacement.code == 0, replacement.stderr
    assert contents(published(job))[ADAPTER] == contents(published(uninterrupted))[ADAPTER]
    assert not (tmp_path / "old machine" / "published").exists()
    assert job.run().ended["train"] == "skipped"


def fill_the_disk(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        while True:
            stream.write(b"\0" * 65536)


def test_a_disk_that_fills_up_ends_with_69_and_leaves_the_last_checkpoint_whole(job: Job, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    job.environment |= {
        "FT_OUTPUT_DIR": str(disk / "results"), "FT_STORE_URL": str(tmp_path / "store"), "FT_STAGES": "train", "FT_SAVE_STEPS": "2",
        "FT_LORA_R": "64", "FT_LORA_TARGET_MODULES": "all-linear", "FT_MAX_STEPS": "40", "FT_LOG_LEVEL": "debug",
    }  # fmt: skip
    script = f"mount -t tmpfs -o size=64m tmpfs '{disk}' && exec {sys.executable} {ROOT / 'entrypoint.py'}"
    process = subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", script],
        env={**os.environ, **job.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    read_until(process, committed=True)
    filler = Path(f"/proc/{process.pid}/root{disk}/filler")  # its disk is in its own mount namespace
    with pytest.raises(OSError, match="No space left"):
        fill_the_disk(filler)
    full = finished(process, *process.communicate(timeout=120))
    assert full.code == 69, full.stderr
    assert "No space left" in full.error["message"]
    assert "FT_OUTPUT_DIR" in full.error["hint"]
    again = job.run()  # without the mount, on the larger disk below it
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) >= 2


@contextmanager
def refusing_server() -> Iterator[str]:
    """A server that answers every request with 401."""

    class Refuse(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _refuse

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "settings",
    [
        {"FT_MODEL_NAME": "somebody/model"},
        {"FT_PUBLISH_TO": "hf://somebody/model"},
        {"FT_STORE_URL": "s3://bucket/prefix"},
        {"FT_DATASET_NAME": "s3://bucket/data"},
    ],
    ids=["model", "destination", "store", "dataset"],
)
def test_when_every_call_is_answered_401_the_job_ends_with_77_and_leaks_no_secret(
    job: Job, settings: dict[str, str]
) -> None:
    canaries = {
        "HF_TOKEN": "hf_canary_AAAA", "AWS_SECRET_ACCESS_KEY": "aws_canary_BBBB", "AWS_ACCESS_KEY_ID": "AKIACANARYCCCC",
        "AWS_SESSION_TOKEN": "aws_canary_DDDD", "WANDB_API_KEY": "wandb_canary_EEEE",
    }  # fmt: skip
    seen: set[bytes] = set()
    with refusing_server() as url:
        job.environment |= {"HF_ENDPOINT": url, "AWS_ENDPOINT_URL": url, "HF_HUB_OFFLINE": "0"}
        process = job.start(FT_LOG_LEVEL="debug", AWS_DEFAULT_REGION="us-east-1", **settings, **canaries)

        def watch() -> None:
            while process.poll() is None:
                for listing in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        seen.add(listing.read_bytes())
                    except OSError:
                        continue
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        result = finished(process, *process.communicate(timeout=180))
        watcher.join()
    assert result.code == 77, result.stderr
    everything = [result.stdout.encode(), result.stderr.encode(), *seen]
    everything += [path.read_bytes() for path in Path(job.environment["FT_OUTPUT_DIR"]).rglob("*") if path.is_file()]
    assert any(b"entrypoint.py" in line for line in seen)
    for canary in canaries.values():
        assert not [data for data in everything if canary.encode() in data]


def test_a_second_start_in_the_same_folder_neither_stops_the_first_nor_removes_its_stop_request(job: Job) -> None:
    first = job.start(FT_MAX_STEPS="400", FT_STAGES="train")
    read_until(first, event="progress", stage="train", done=2)
    second = job.start(FT_MAX_STEPS="400", FT_STAGES="train")
    assert second.stdout is not None and second.stdout.readline(), (
        "it says which run this is, then waits for its folder"
    )
    time.sleep(0.3)
    second.send_signal(signal.SIGTERM)
    assert finished(second, *second.communicate(timeout=60)).code == 75
    assert not (Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "stop-request").exists()
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert finished(first, *first.communicate(timeout=60)).code == 75
    assert first.returncode == 75


def test_a_job_whose_log_nobody_reads_any_more_continues(job: Job) -> None:
    process = job.start(FT_STAGES="train")
    read_until(process, event="progress", stage="train", done=1)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 0
