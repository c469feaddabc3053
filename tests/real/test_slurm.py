"""`sbatch slurm/train.sh` on a real Slurm. No test does anything that an operator would have to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.test_local_checkpoints import refusing_checkpoints
from tests.conftest import LIGHTHOUSE, Job, free_port, unavailable
from tests.real.slurm_cluster import NEEDED, Slurm, slurm_cluster

pytestmark = pytest.mark.xdist_group("slurm")
SMALL = ("--cpus-per-gpu=2", "--mem=2000")
ADAPTER = "train/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        unavailable(f"needs root and Slurm's {', '.join(missing) or 'daemons'}: apt-get install slurmctld slurmd munge")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def settings(tiny_model: Path) -> dict[str, str]:
    return {
        "FT_MODEL_NAME": str(tiny_model), "FT_DATASET_NAME": str(LIGHTHOUSE), "FT_DATASET_SPLIT": "train[:48]", "FT_EVAL_SPLIT": "0.2",
        "FT_DEVICE": "cpu", "FT_LORA_R": "4", "FT_MAX_STEPS": "6", "FT_SAVE_STEPS": "1000", "FT_LOGGING_STEPS": "1",
        "FT_LEARNING_RATE": "1e-3", "FT_STAGES": "train", "FT_LOG_FORMAT": "json", "FT_STOP_GRACE_SECONDS": "20", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def adapter(slurm: Slurm, run_id: str) -> bytes:
    return (slurm.folder / "checkout" / "results" / "runs" / run_id / ADAPTER).read_bytes()


def events(slurm: Slurm, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in slurm.log(job).splitlines() if line.startswith("{")]


def resumed_steps(slurm: Slurm, job: str) -> list[int]:
    return [event["step"] for event in events(slurm, job) if event.get("message", "").startswith("Resuming from")]


def steps_shown(slurm: Slurm, job: str) -> int:
    return len(re.findall(r'"stage": "train", "event": "progress"', slurm.log(job)))


def steps_per_second(slurm: Slurm, job: str) -> float:
    """The speed of a training that nothing interrupted."""
    shown = [event for event in events(slurm, job) if (event.get("event"), event.get("stage")) == ("progress", "train")]
    began, ended = (datetime.fromisoformat(event["time"]) for event in (shown[0], shown[-1]))
    return float(shown[-1]["done"] - shown[0]["done"]) / max(1.0, (ended - began).total_seconds())


def await_training(slurm: Slurm, job: str, more_steps: int = 4) -> None:
    """Wait until this start of the job has taken some steps."""
    starts = '"event": "stage_started", "stage": "train"'
    slurm.await_log(job, starts, times=int(slurm.facts(job)["Restarts"]) + 1)
    wanted, deadline = steps_shown(slurm, job) + more_steps, time.monotonic() + 120
    while steps_shown(slurm, job) < wanted:
        assert time.monotonic() < deadline, slurm.log(job)
        time.sleep(0.1)


def test_a_job_preempted_three_times_in_a_row_finishes_by_itself_with_the_adapter_of_an_undisturbed_run(
    slurm: Slurm, settings: dict[str, str], tmp_path: Path
) -> None:
    settings["FT_MAX_STEPS"] = "300"
    job = slurm.submit(*SMALL, "--nodelist=node1", settings=settings)
    for _ in range(3):
        await_training(slurm, job)
        urgent = ("--partition=urgent", "--exclusive", "--nodelist=node1", "--output=/dev/null", "--wrap=sleep 1")
        slurm.await_end(slurm.command("sbatch", "--parsable", *urgent))
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "3", "0:0")
    resumed = resumed_steps(slurm, job)
    assert len(resumed) == 3 and 0 < resumed[0] < resumed[1] < resumed[2], resumed
    alone = Job({**settings, "FT_OUTPUT_DIR": str(tmp_path / "alone"), "FT_RUN_ID": "alone"})
    assert alone.run().code == 0
    assert adapter(slurm, f"slurm-{job}") == (tmp_path / "alone/runs/alone" / ADAPTER).read_bytes()


def test_a_job_whose_node_dies_resumes_on_another_node(slurm: Slurm, settings: dict[str, str]) -> None:
    settings |= {"FT_MAX_STEPS": "300", "FT_SAVE_STEPS": "5"}
    job = slurm.submit(*SMALL, settings=settings)
    await_training(slurm, job, more_steps=40)
    died = slurm.facts(job)["NodeList"]
    slurm.kill_node(died)
    try:
        ended = slurm.await_end(job)
    finally:
        slurm.start_node(died)
    assert ended["JobState"] == "COMPLETED" and ended["NodeList"] != died
    assert resumed_steps(slurm, job)


def test_two_nodes_train_together_and_the_second_leaves_the_rest_to_the_first(
    slurm: Slurm, settings: dict[str, str]
) -> None:
    job = slurm.submit("--nodes=2", *SMALL, settings=settings | {"FT_STAGES": "train,sample"})
    assert slurm.await_end(job)["JobState"] == "COMPLETED", slurm.log(job)
    run = slurm.folder / "checkout" / "results" / "runs" / f"slurm-{job}"
    assert json.loads((run / "train" / "metrics.json").read_text(encoding="utf-8"))["processes"] == 2
    endings = [event for event in events(slurm, job) if event.get("event") == "run_ended"]
    assert sorted(len(event["stages"]) for event in endings) == [4, 5]
    assert not (run / "nodes" / "1" / "sample").exists()


def test_a_settings_error_fails_and_is_not_requeued(slurm: Slurm, settings: dict[str, str]) -> None:
    job = slurm.submit(*SMALL, settings=settings | {"FT_LORA_R": "none"})
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "78:0", "0")
    assert "FT_LORA_R='none'" in slurm.log(job)


def test_an_unfit_node_is_excluded_and_the_job_is_retried_on_another(slurm: Slurm, settings: dict[str, str]) -> None:
    job = slurm.submit(*SMALL, settings=settings | {"FT_DEVICE": "cuda"})  # there is no GPU on this machine
    slurm.await_log(job, '"exit_code": 69', times=2)
    deadline = time.monotonic() + 60
    while True:  # the script excludes the second node before it ends, so the job completes for a moment longer
        facts = slurm.facts(job)
        if set(facts["ExcNodeList"].split(",")) == {"node1", "node2"} and facts["JobState"] == "PENDING":
            break
        assert time.monotonic() < deadline, facts
        time.sleep(0.5)
    slurm.command("scancel", job)


def test_a_cancelled_job_stores_a_checkpoint_and_does_not_come_back(slurm: Slurm, settings: dict[str, str]) -> None:
    job = slurm.submit(*SMALL, settings=settings | {"FT_MAX_STEPS": "4000"})
    await_training(slurm, job)
    slurm.command("scancel", job)
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    store = slurm.folder / "checkout" / "results" / "store" / f"slurm-{job}" / "checkpoints"
    deadline = time.monotonic() + 30
    while not list(store.glob("*/*/MANIFEST.json")):
        assert time.monotonic() < deadline, slurm.log(job)
        time.sleep(0.2)


@pytest.mark.timeout(2400)
def test_array_elements_are_separate_runs_and_resume_after_their_time_limits(
    slurm: Slurm, settings: dict[str, str]
) -> None:
    """In Slurm's commands, one element's id also names the whole array. No element may affect another."""
    steps = 400
    settings["FT_MAX_IDLE_STARTS"] = "50"  # on a busy machine, some starts are too short to store anything
    for _ in range(3):  # until both trainings were interrupted, no matter how fast this machine is
        options = ("--array=0-1", *SMALL, "--time=2", "--signal=B:USR1@75")
        array = slurm.submit(*options, settings=settings | {"FT_MAX_STEPS": str(steps)})
        endings = [slurm.await_end(f"{array}_{index}", seconds=780) for index in range(2)]
        for ended in endings:
            log = slurm.log(ended["JobId"])
            assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
            assert (
                len(re.findall(r'"message": "Run \S+: ', log)) == int(ended["Restarts"]) + 1
            )  # nobody else started or stopped it
        quick = [ended["JobId"] for ended in endings if not resumed_steps(slurm, ended["JobId"])]
        if not quick:
            break
        steps = int(50 * max(steps_per_second(slurm, job) for job in quick))
    assert all(resumed_steps(slurm, ended["JobId"]) for ended in endings)
    runs = slurm.folder / "checkout" / "results" / "runs"
    assert all((runs / f"slurm-{array}-{index}" / ADAPTER).exists() for index in range(2))


def test_settings_come_from_the_named_file_and_a_container_from_its_image(
    slurm: Slurm, settings: dict[str, str]
) -> None:
    """A stand-in for Apptainer shows how it was called, and runs the command outside a container."""
    checkout = slurm.folder / "checkout"
    lines = [f"{name}={value}\n" for name, value in settings.items() if name.startswith("FT_")]
    elsewhere = slurm.folder / "scratch"  # neither below the submit folder nor known to the environment
    lines += [
        "export FT_OUTPUT_DIR = '${SITE_SCRATCH}/out' # big and fast\n",
        f'FT_STORE_URL="file://{elsewhere}/store"\n',
    ]
    (checkout / "my.env").write_text("".join(lines), encoding="utf-8")
    tool = slurm.folder / "bin" / "apptainer"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/bash\necho "apptainer $*"\nshift $(($# - 1))\nexec {checkout}/.venv/bin/python entrypoint.py "$@"\n',
        encoding="utf-8",
    )
    tool.chmod(0o755)
    (checkout / "image.sif").touch()
    job = slurm.submit(
        *SMALL,
        settings={
            "FT_ENV_FILE": "my.env", "FT_CONTAINER": "image.sif", "FT_STAGES": "preflight", "PATH": f"{tool.parent}:{os.environ['PATH']}",
            "SITE_SCRATCH": str(elsewhere),
        },
    )  # fmt: skip
    assert slurm.await_end(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert (elsewhere / "out" / "runs" / f"slurm-{job}").is_dir() and (elsewhere / "store" / f"slurm-{job}").is_dir()
    called = re.search(r"^apptainer (.*)$", slurm.log(job), re.MULTILINE)
    assert called is not None
    assert (
        called[1]
        == f"exec --nv --bind {bound(checkout, elsewhere, settings)} --pwd {checkout} --env FT_OUTPUT_DIR={elsewhere}/out image.sif python3 /app/entrypoint.py run"
    )


def bound(checkout: Path, elsewhere: Path, settings: dict[str, str]) -> str:
    folders = [checkout, elsewhere / "out", elsewhere / "store", settings["FT_MODEL_NAME"], settings["FT_DATASET_NAME"]]
    known = [f"{folder}:{folder}" for folder in folders]
    return ",".join([known[0], f"{checkout}/results:/work", *known[1:]])


def test_pyxis_is_given_the_image_and_every_folder_that_the_job_needs(slurm: Slurm, settings: dict[str, str]) -> None:
    """A stand-in for Pyxis, which adds options to srun, shows them, and runs the command outside a container."""
    checkout, elsewhere = slurm.folder / "checkout", slurm.folder / "pyxis"
    tool = slurm.folder / "pyxis-bin" / "srun"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/bash
rest=()
for word in "$@"; do
  case "$word" in --container-*) echo "pyxis $word" ;; /app/*) rest+=("{checkout}/entrypoint.py") ;; *) rest+=("$word") ;; esac
done
PATH="{checkout}/.venv/bin:$PATH" exec {shutil.which("srun")} "${{rest[@]}}"
""",
        encoding="utf-8",
    )
    tool.chmod(0o755)
    published = [elsewhere / "new", elsewhere / "newer"]  # neither exists yet
    stores = {
        "FT_OUTPUT_DIR": f"{elsewhere}/out", "FT_STORE_URL": f"{elsewhere}/store",
        "FT_PUBLISH_TO": f"{published[0]}, {published[1]}",
    }  # fmt: skip
    asked = {
        "FT_CONTAINER": "registry#me/finetune:1",
        "FT_STAGES": "preflight",
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
    }
    job = slurm.submit(*SMALL, settings=settings | stores | asked)
    assert slurm.await_end(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert set(re.findall(r"^pyxis (.*)$", slurm.log(job), re.MULTILINE)) == {
        "--container-image=registry#me/finetune:1",
        ",".join(
            [f"--container-mounts={bound(checkout, elsewhere, settings)}", *(f"{one}:{one}" for one in published)]
        ),
        f"--container-workdir={checkout}",
        "--container-env=FT_OUTPUT_DIR",
    }


# -- no loop that burns money ------------------------------------------------------------------------------------------


@pytest.fixture
def s3_settings(slurm: Slurm, tmp_path: Path, s3_server: str) -> Iterator[dict[str, str]]:
    with refusing_checkpoints(s3_server) as proxy:
        yield {
            "FT_STORE_URL": f"s3://bucket/{tmp_path.name}", "AWS_ENDPOINT_URL": proxy.url, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip


@pytest.mark.timeout(1200)
def test_a_job_whose_every_start_fails_to_store_ends_by_itself_after_five(
    slurm: Slurm, settings: dict[str, str], s3_settings: dict[str, str]
) -> None:
    job = slurm.submit(*SMALL, settings=settings | s3_settings)
    ended = slurm.await_end(job, seconds=900)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "69:0", "5"), slurm.log(job)
    assert "5 starts of this run in a row have stored nothing new" in slurm.log(job)


@pytest.mark.timeout(1200)
def test_a_job_on_nodes_without_a_route_to_its_sources_ends_by_itself(
    slurm: Slurm, settings: dict[str, str], tmp_path: Path
) -> None:
    away = {
        "FT_MODEL_NAME": "me/model", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "HF_HOME": str(tmp_path), "FT_MAX_IDLE_STARTS": "2",
    }  # fmt: skip
    job = slurm.submit(*SMALL, settings=settings | away)
    ended = slurm.await_end(job, seconds=900)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "69:0", "2"), slurm.log(job)
    assert "The Hub cannot be reached" in slurm.log(job)


@pytest.mark.timeout(600)
def test_a_time_limit_that_was_extended_while_the_job_runs_is_used(slurm: Slurm, settings: dict[str, str]) -> None:
    job = slurm.submit(
        *SMALL, "--time=1", "--signal=B:USR1@40", settings=settings | {"FT_MAX_STEPS": "100000", "ASK_SECONDS": "1"}
    )
    slurm.await_log(job, '"event": "stage_started"')
    old_end = datetime.fromisoformat(slurm.facts(job)["EndTime"]).timestamp()
    slurm.command("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    await_training(slurm, job)
    while time.time() < old_end - 5:  # it would have stopped 20 s before its old end
        time.sleep(0.5)
    before = steps_shown(slurm, job)
    time.sleep(5)
    assert steps_shown(slurm, job) > before, slurm.log(job)
    assert "time limit" not in slurm.log(job)
    slurm.command("scancel", job)
    assert slurm.await_end(job)["Restarts"] == "0"


def stand_in(slurm: Slurm, folder: Path, command: str, condition: str, refusal: str) -> str:
    """A PATH on which `command` fails with `refusal` while `condition` holds, and is Slurm's own otherwise."""
    real = shutil.which(command)
    tool = folder / "bin" / command
    tool.parent.mkdir(exist_ok=True)
    count = folder / f"{command}.count"
    text = f"""#!/bin/bash
echo >>{count}
if {condition.format(count=count)}; then echo '{refusal}' >&2; exit 1; fi
exec {real} "$@"
"""
    tool.write_text(text, encoding="utf-8")
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


@pytest.mark.timeout(600)
def test_a_controller_that_is_away_for_a_moment_does_not_lose_the_job(
    slurm: Slurm, settings: dict[str, str], tmp_path: Path
) -> None:
    away = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    path = stand_in(slurm, tmp_path, "squeue", '[[ "$*" == *%T* ]] && [ "$(wc -l <{count})" -lt 3 ]', away)
    job = slurm.submit(*SMALL, settings=settings | {"FT_DEVICE": "cuda", "PATH": path, "ASK_SECONDS": "600"})
    deadline = time.monotonic() + 120
    while int(slurm.facts(job)["Restarts"]) < 1:
        assert time.monotonic() < deadline, slurm.log(job)
        time.sleep(0.5)
    slurm.command("scancel", job)


def test_a_requeue_that_slurm_refuses_is_told_with_the_command_that_resumes(
    slurm: Slurm, settings: dict[str, str], tmp_path: Path
) -> None:
    refusal = "Requested operation is presently disabled"
    path = stand_in(slurm, tmp_path, "scontrol", '[ "$1" = requeue ]', refusal)
    job = slurm.submit(*SMALL, settings=settings | {"FT_DEVICE": "cuda", "PATH": path})
    ended = slurm.await_end(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "69:0")
    assert f"Not requeued: Slurm refuses it: {refusal}" in slurm.log(job)
    assert f"FT_RUN_ID=slurm-{job} sbatch slurm/train.sh" in slurm.log(job)


def test_the_sites_own_file_runs_first_and_the_log_is_for_people(slurm: Slurm, settings: dict[str, str]) -> None:
    site = slurm.folder / "checkout" / "slurm" / "site.sh"
    site.write_text('echo "site of $SLURM_JOB_ID$NOT_SET_BY_ANYBODY"\nexport FT_MAX_STEPS=x\n', encoding="utf-8")
    plain = {name: value for name, value in settings.items() if name != "FT_LOG_FORMAT"}
    try:
        job = slurm.submit(*SMALL, settings=plain | {"FT_STAGES": "preflight"})
        assert slurm.await_end(job)["ExitCode"] == "78:0", slurm.log(job)
        assert f"site of {job}\n" in slurm.log(job) and "FT_MAX_STEPS='x'" in slurm.log(job)
    finally:
        site.unlink()
    job = slurm.submit(*SMALL, settings=plain | {"FT_STAGES": "preflight"})
    assert slurm.await_end(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert "▸ preflight" in slurm.log(job) and not events(slurm, job)


def test_a_python_that_is_too_old_is_told_before_anything_runs(slurm: Slurm, settings: dict[str, str]) -> None:
    """A stand-in says that it is Python 3.9."""
    checkout = slurm.folder / "checkout"
    real, aside = checkout / ".venv", checkout / ".venv-aside"
    old = slurm.folder / "old" / "python3"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2" && exit\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    real.rename(aside)
    try:
        job = slurm.submit(*SMALL, settings=settings | {"PATH": f"{old.parent}:{os.environ['PATH']}"})
        assert slurm.await_end(job)["ExitCode"] == "78:0", slurm.log(job)
    finally:
        aside.rename(real)
    assert "Python 3.11 or newer is needed, and python3 is Python 3.9.2" in slurm.log(job)


def test_cpus_grow_with_the_number_of_gpus(slurm: Slurm, settings: dict[str, str]) -> None:
    job = slurm.submit(
        "--gpus-per-node=2", "--cpus-per-gpu=2", "--mem=2000", settings=settings | {"FT_STAGES": "preflight"}
    )
    ended = slurm.await_end(job)
    assert ended["JobState"] == "COMPLETED", slurm.log(job)
    assert ended["NumCPUs"] == "4"
