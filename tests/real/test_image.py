"""Build the Dockerfile, run the image as a careful operator would, and play the manifests' pods."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from tests.conftest import LIGHTHOUSE, ROOT, unavailable
from tests.fake_hub import FakeHub, Fault
from tests.real.containers import IMAGE, NEEDED, Containers
from tests.real.pods import Kubelet, manifest_objects, played, pod_of, suspend_stage

pytestmark = [pytest.mark.xdist_group("image"), pytest.mark.timeout(2400)]
HARDENED = (
    "--network=none", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges",
    "--memory=6g", "--user=10001:10001",
)  # fmt: skip
SMALL_RUN = {
    "FT_MODEL_NAME": "/inputs/model", "FT_DATASET_NAME": "/inputs/lighthouse.jsonl", "FT_DATASET_SPLIT": "train[:32]", "FT_DEVICE": "cpu",
    "FT_LORA_R": "4", "FT_STAGES": "train", "FT_LOG_FORMAT": "json", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        unavailable(f"needs root and {', '.join(missing) or 'nothing else'}: apt-get install {' '.join(NEEDED)}")
    kept = os.environ.get("IMAGE_TEST_STORAGE")  # lets a developer build the layers only once
    containers = Containers(Path(kept) if kept else tmp_path_factory.mktemp("containers"))
    containers.configure()
    containers.make_base()
    containers.build()
    yield containers
    containers.command("podman", "rm", "--all", "--force", check=False)
    if not kept:
        containers.command("podman", "rmi", "--all", "--force", check=False)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The one volume, writable by the image's user, as a cluster's fsGroup makes it."""
    folder = tmp_path / "work"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    return folder


def inputs(folder: Path, model: Path) -> tuple[str, ...]:
    readable = folder / "model"
    shutil.copytree(model, readable)
    subprocess.run(["chmod", "-R", "a+rX", str(folder), str(folder.parent)], check=True)
    return (f"--volume={readable}:/inputs/model:ro", f"--volume={LIGHTHOUSE}:/inputs/lighthouse.jsonl:ro")


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_demos_job_runs_with_no_network_no_privileges_and_a_read_only_root_and_resumes_after_a_stop(
    containers: Containers, work: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """Uses the settings of `make demo`, but for a model so small that its steps must be many for a stop mid-training."""
    settings = {name: str(value) for name, value in dotenv_values(ROOT / "examples" / "demo.env").items()}
    settings |= {
        "FT_MODEL_NAME": "/inputs/model", "FT_DATASET_NAME": "/inputs/lighthouse.jsonl", "FT_MAX_STEPS": "200", "FT_RUN_ID": "demo",
        "FT_DATASET_SPLIT": "train[:60]", "FT_SAVE_STEPS": "1000", "FT_STOP_GRACE_SECONDS": "40", "FT_SAMPLE_MAX_NEW_TOKENS": "8",
    }  # fmt: skip
    options = [*HARDENED, f"--volume={work}:/work", *inputs(tmp_path / "inputs", tiny_model)]
    options += [f"--env={name}={value}" for name, value in settings.items()]

    first = containers.start("run", "--name=first", *options, IMAGE)
    assert first.stdout is not None
    for line in first.stdout:
        event = json.loads(line)
        if event.get("event") == "progress" and event.get("stage") == "train" and event["done"] >= 2:
            break
    containers.command("podman", "stop", "--time=50", "first")
    first.communicate(timeout=60)
    assert first.returncode == 75
    assert list((work / "results/store/demo/checkpoints").glob("step-*/attempt-0001/MANIFEST.json"))
    assert changes(containers, "first") == set()

    second = containers.command("podman", "run", "--name=second", *options, IMAGE, check=False)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    said = events(second.stdout)
    assert any(event.get("message", "").startswith("Resuming from the checkpoint of step") for event in said)
    assert (work / "results/published/smollm2-135m-lighthouse/model.safetensors").is_file()
    assert changes(containers, "second") == set()
    containers.command("podman", "rm", "first", "second")


def changes(containers: Containers, name: str) -> set[str]:
    """What a container wrote outside its volumes, mount points aside."""
    lines = containers.command("podman", "diff", name).stdout.split("\n")
    mounted = {
        "/inputs",
        "/inputs/model",
        "/inputs/lighthouse.jsonl",
        "/work",
        "/tmp",
        "/run",
        "/etc",
        "/dev",
        "/proc",
        "/sys",
    }
    return {
        path
        for path in (line[2:] for line in lines if line)
        if path not in mounted and not path.startswith(("/run/", "/etc/"))
    }


def test_the_image_names_its_versions_and_refuses_wrong_settings_in_under_a_second(containers: Containers) -> None:
    version = containers.command("podman", "run", "--rm", *HARDENED, IMAGE, "--version").stdout
    for package in ("torch 2.13.0", "CUDA none", "transformers 5.", "trl 1.", "peft 0.", "bitsandbytes 0."):
        assert package in version
    wrong = containers.command("podman", "run", "--rm", *HARDENED, "--env=FT_LORA_R=x", IMAGE, check=False)
    assert wrong.returncode == 78
    assert "FT_LORA_R='x'" in json.loads(wrong.stderr)["message"]


def test_the_image_holds_no_secret_no_tests_and_nothing_for_root_to_do(containers: Containers) -> None:
    inspected = json.loads(containers.command("podman", "image", "inspect", IMAGE).stdout)[0]
    config = inspected["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["tini", "--", "python3", "/app/entrypoint.py"] and config["Cmd"] == ["run"]
    assert config["Labels"]["org.opencontainers.image.title"] == "finetune-job"
    assert not [line for line in config["Env"] if re.search(r"TOKEN|SECRET|PASSWORD|KEY|PIP_|proxy", line)]
    shell = ("run", "--rm", *HARDENED, "--entrypoint=/bin/sh", IMAGE, "-c")
    assert containers.command("podman", *shell, "stat -c '%g %A' /work").stdout.split()[0] == "0"
    listed = containers.command(
        "podman", *shell, "ls /app /run/secrets 2>&1; id -u; find / -xdev -perm -4000 -writable 2>/dev/null; true"
    ).stdout
    assert "tests" not in listed and "ca.crt" not in listed and "pip.conf" not in listed and "10001" in listed


def test_exceeding_the_memory_limit_ends_with_the_code_for_an_unfit_node(
    containers: Containers, work: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """What is loaded fits the limit, but one batch needs many times as much.

    With a lower limit the kernel would reread libraries endlessly instead of killing anything.
    """
    rows = tmp_path / "many.jsonl"
    rows.write_text(LIGHTHOUSE.read_text(encoding="utf-8") * 20, encoding="utf-8")
    rows.chmod(0o644)
    options = [
        "--network=none",
        "--read-only",
        "--tmpfs=/tmp",
        "--memory=1200m",
        "--memory-swap=1200m",
        f"--volume={work}:/work",
        f"--volume={rows}:/inputs/many.jsonl:ro",
    ]
    settings = {
        "FT_MODEL_NAME": "/inputs/model",
        "FT_DATASET_NAME": "/inputs/many.jsonl",
        "FT_DEVICE": "cpu",
        "FT_STAGES": "train",
        "FT_LORA_R": "4096",
        "FT_LORA_TARGET_MODULES": "all-linear",
        "FT_DECODER_LAYERS": "plain",
        "FT_PER_DEVICE_TRAIN_BATCH_SIZE": "4096",
    }
    options += [
        *inputs(tmp_path / "inputs", tiny_model),
        *(f"--env={name}={value}" for name, value in settings.items()),
    ]
    starved = containers.command("podman", "run", "--rm", *options, IMAGE, check=False)
    assert starved.returncode == 69, starved.stdout[-2000:] + starved.stderr[-2000:]


def test_torch_and_the_other_packages_are_layers_of_their_own_and_new_code_changes_neither(
    containers: Containers, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Dockerfile", ".dockerignore", "entrypoint.py", "requirements.txt", "requirements-cpu.txt"):
        shutil.copy2(ROOT / name, checkout / name)
    shutil.copytree(ROOT / "job", checkout / "job", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "job" / "report" / "more.py").write_text('"""New code."""\n', encoding="utf-8")
    containers.build(checkout, "localhost/finetune-job:next")
    before, after = (layers(containers, image) for image in (IMAGE, "localhost/finetune-job:next"))
    same = [one for one, two in zip(before, after, strict=True) if one == two]
    assert same == before[: len(same)] and len(same) >= len(before) - 4, "only the layers of the code are new"
    history = containers.command("podman", "history", "--no-trunc", "--format={{.Size}} {{.CreatedBy}}", IMAGE).stdout
    assert sorted(re.findall(r"part=(\w+) && eval", history)) == ["cuda", "cudnn", "math", "rest", "torch"]
    containers.command("podman", "rmi", "--force", "localhost/finetune-job:next")


def layers(containers: Containers, image: str) -> list[str]:
    return list(json.loads(containers.command("podman", "image", "inspect", image).stdout)[0]["RootFS"]["Layers"])


@pytest.mark.parametrize(
    ("file", "user"),
    [
        ("k8s/finetune-job.yaml", (10001, 10001)),
        ("k8s/finetune-job.yaml", (1000650000, 0)),  # as OpenShift chooses it
        ("k8s/finetune-multinode.yaml", (10001, 10001)),
    ],
)
def test_the_manifests_pod_runs_as_written(
    containers: Containers, work: Path, tmp_path: Path, tiny_model: Path, file: str, user: tuple[int, int]
) -> None:
    os.chown(work, 0 if user[1] == 0 else user[0], user[1])
    work.chmod(0o775)
    objects = manifest_objects(file)
    job = objects["Job"]
    nodes = int(job["spec"].get("completions", 1))
    inputs(tmp_path / "inputs", tiny_model)
    settings = {**SMALL_RUN, "FT_MAX_STEPS": "3"}
    if nodes > 1:
        settings["FT_STORE_URL"] = "/work/store"
    documents = [{**objects["ConfigMap"], "data": settings}]
    for index in range(nodes):
        pod = pod_of(job, index, work, tmp_path / "inputs" / "model", shared_network=nodes > 1)
        pod["spec"]["securityContext"] |= {"runAsUser": user[0], "runAsGroup": user[1], "fsGroup": user[1]}
        documents.append(pod)
    with played(containers, documents, "host" if nodes > 1 else "none", tmp_path) as names:
        codes = [containers.command("podman", "wait", name, timeout=400).stdout.strip() for name in names]
        logs = "\n".join(containers.command("podman", "logs", name).stdout for name in names)
        assert codes == ["0"] * nodes, logs[-4000:]
        run = work / "results" / "runs" / job["metadata"]["name"]
        metrics = json.loads((run / "train" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["processes"] == nodes


def test_whatever_hangs_in_a_pod_ends_with_the_code_for_an_unfit_node(
    containers: Containers, tmp_path: Path, tiny_model: Path, hub: FakeHub
) -> None:
    """A download, a training and an evaluation are suspended, each in a pod with the shipped probe and grace time."""
    hub.add("models/base/tiny", tiny_model)
    hub.fault = lambda method, path: Fault(seconds=9) if method == "GET" and "safetensors" in path else None
    downloading = {"FT_MODEL_NAME": "base/tiny", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    objects = manifest_objects("k8s/finetune-job.yaml")
    inputs(tmp_path / "inputs", tiny_model)
    shipped = {"FT_STOP_GRACE_SECONDS": objects["ConfigMap"]["data"]["FT_STOP_GRACE_SECONDS"]}
    long = {"FT_MAX_STEPS": "100000", "FT_STALL_SECONDS": "60", "FT_DATASET_SPLIT": "train"}
    evaluating = {"FT_EVAL_SPLIT": "0.5", "FT_EVAL_STEPS": "2", "FT_PER_DEVICE_EVAL_BATCH_SIZE": "1"}
    hangs: dict[str, tuple[dict[str, str], Callable[[dict[str, Any]], bool]]] = {
        "download": (downloading, lambda event: event.get("message", "").startswith("FT_MODEL_NAME")),
        "training": ({}, lambda event: event.get("event") == "progress" and event.get("stage") == "train"),
        "evaluation": (evaluating, lambda event: event.get("stage") == "train" and 0 < event.get("evaluated", 0) < 20),
    }
    documents = []
    for index, (name, (more, _)) in enumerate(hangs.items()):
        work = tmp_path / name / "work"
        work.mkdir(parents=True)
        os.chown(work, 10001, 10001)
        pod = pod_of(objects["Job"], index, work, tmp_path / "inputs" / "model", shared_network=True)
        pod["metadata"]["name"] = f"hangs-{name}"
        config = {
            **objects["ConfigMap"],
            "metadata": {"name": f"settings-{name}"},
            "data": shipped | SMALL_RUN | long | more,
        }
        pod["spec"]["containers"][0]["envFrom"] = [{"configMapRef": {"name": f"settings-{name}"}}]
        documents += [config, pod]
    with played(containers, documents, "host", tmp_path) as names:
        kubelets = [Kubelet(containers, name, 9400 + index, objects["Job"]) for index, name in enumerate(names)]
        for kubelet in kubelets:
            kubelet.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name, hang: suspend_stage(containers, name, hang[1]), names, hangs.values()))
        for (what, (_, reached)), name, kubelet in zip(hangs.items(), names, kubelets, strict=True):
            code = containers.command("podman", "wait", name, timeout=400).stdout.strip()
            kubelet.join()
            said = containers.command("podman", "logs", name)
            stage = "download" if what == "download" else "train"
            assert code == "69", f"{what}: {code} {said.stdout[-2000:]} {said.stderr[-2000:]}"
            assert f"Stage {stage} has made no progress for" in said.stdout + said.stderr
            shown = [event for event in events(said.stdout) if event.get("event") == "progress"]
            assert what != "evaluation" or reached(shown[-1]), shown[-3:]
