"""What a spot machine costs that kills 5 s after SIGTERM, as RunPod's do: `python -m tests.torture.spot --kills 20 --seed 0`.

A job stores a checkpoint every 100 steps, some five seconds, in an S3 server that takes it in about three. At a random
moment of its training it gets SIGTERM, 5 s later SIGKILL, and then its disk is gone. The next start has the store alone.
Steps that were taken and must be taken again are lost. They may be those of one save interval at most.
"""

from __future__ import annotations

import argparse
import contextlib
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
from pathlib import Path
from typing import NamedTuple

from tests.conftest import LIGHTHOUSE, OFFLINE, Job, make_tiny_model, serve_s3, session_folder
from tests.fault_proxy import FaultProxy

SAVE_STEPS, GRACE_SECONDS, BYTES_PER_SECOND = 100, 5.0, 500_000


class Loss(NamedTuple):
    """One kill: the seconds of training before SIGTERM, the last step taken, the step that the next start resumes from."""

    after_seconds: float
    taken: int
    resumed: int
    ended_itself: bool

    @property
    def steps(self) -> int:
        return self.taken - self.resumed


def lose_a_machine(job: Job, after_seconds: float) -> Loss:
    """Train on a machine that is taken away, then on one that has the store alone."""
    output = Path(job.environment["FT_OUTPUT_DIR"])
    process = job.start()
    steps: list[int] = []
    training = threading.Event()

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "progress" and event.get("stage") == "train":
                steps.append(int(event["done"]))
                if steps[-1] > 0:
                    training.set()

    follower = threading.Thread(target=follow)
    follower.start()
    assert training.wait(120), "the training did not start"
    time.sleep(after_seconds)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    ended_itself = process.poll() is not None
    process.kill()
    process.wait()
    follower.join()
    shutil.rmtree(output)
    again = job.start()
    assert again.stdout is not None
    resumed = 0
    for line in again.stdout:
        event = json.loads(line)
        if event.get("message", "").startswith("Resuming from"):
            resumed = int(event["step"])
        if event.get("event") == "progress" and event.get("stage") == "train":
            break
    again.kill()
    again.communicate()
    shutil.rmtree(output, ignore_errors=True)
    return Loss(after_seconds, max(steps), resumed, ended_itself)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, losses = random.Random(options.seed), []
    secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= secrets
    with tempfile.TemporaryDirectory(prefix="spot-") as scratch:
        top = Path(scratch)
        model = make_tiny_model(top / "model")
        (top / "s3").mkdir()
        with serve_s3(top / "s3") as s3, FaultProxy(s3, bytes_per_second=BYTES_PER_SECOND) as slow:
            for number in range(options.kills):
                job = Job(
                    {
                        **OFFLINE, "FT_MODEL_NAME": str(model), "FT_DATASET_NAME": str(LIGHTHOUSE), "FT_DEVICE": "cpu",
                        "FT_STAGES": "train", "FT_MAX_STEPS": "1000", "FT_SAVE_STEPS": str(SAVE_STEPS), "FT_LOGGING_STEPS": "1",
                        "FT_LORA_R": "64", "FT_LORA_TARGET_MODULES": "all-linear", "FT_NUM_TRAIN_EPOCHS": "99",
                        "FT_STORE_URL": f"s3://bucket/kill-{number}", "AWS_ENDPOINT_URL": slow.url, "FT_OUTPUT_DIR": str(top / "disk"),
                        "FT_RUN_ID": "spot", "FT_LOG_FORMAT": "json", "HF_HOME": str(session_folder() / "hf-home"),
                    }
                )  # fmt: skip
                loss = lose_a_machine(job, chance.uniform(0, 20))
                losses.append(loss)
                ended = "ended by itself" if loss.ended_itself else "was killed"
                print(f"SIGTERM after {loss.after_seconds:4.1f} s: {ended}, {loss.taken} steps taken, resumed from "
                      f"{loss.resumed}: {loss.steps} lost", flush=True)  # fmt: skip
    worst = max(loss.steps for loss in losses)
    print(f"{len(losses)} kills: at most {worst} steps lost, one save interval is {SAVE_STEPS}.")
    return int(worst > SAVE_STEPS)


if __name__ == "__main__":
    sys.exit(main())
