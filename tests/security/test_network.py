"""What the job does to the network, and what the network can do to the job."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job.report.metrics import Metrics
from tests.conftest import ROOT, Job, free_port, unavailable


def in_a_namespace(
    job: Job, tmp_path: Path, *command: str, through: Sequence[str] = (), **settings: str
) -> dict[str, Any]:
    if shutil.which("ip") is None or subprocess.run(["unshare", "-Urn", "ip", "link"], capture_output=True).returncode:
        unavailable("needs iproute2 and user namespaces")
    report = tmp_path / "report.json"
    done = subprocess.run(
        ["unshare", "-Urn", sys.executable, "-m", "tests.security.namespace", str(report), sys.executable, *through, str(ROOT / "entrypoint.py"), *command],
        env={**os.environ, **job.environment, **settings, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), settings.get("PYTHONPATH")]))},
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert report.exists(), done.stderr
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    assert found["code"] == 0, done.stdout[-2000:] + done.stderr
    return found


_NO_PICKLES = """
import builtins, sys
real = builtins.__import__

def refuse(*_, **__):
    raise AssertionError("an object was pickled for another rank")

def patched(name, *rest, **named):
    module = real(name, *rest, **named)
    c10d = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is not None and getattr(c10d, "_object_to_tensor", refuse) is not refuse and hasattr(c10d, "gather_object"):
        c10d._object_to_tensor = c10d._tensor_to_object = refuse
    return module

builtins.__import__ = patched
"""


def test_two_ranks_listen_on_loopback_alone_and_pickle_nothing_for_each_other(job: Job, tmp_path: Path) -> None:
    """torch's own meeting point listened on every interface, and unpickled what it was sent."""
    (tmp_path / "sitecustomize.py").write_text(_NO_PICKLES, encoding="utf-8")
    found = in_a_namespace(
        job, tmp_path, FT_STAGES="train", FT_NPROC_PER_NODE="2", FT_MAX_STEPS="4", FT_SAVE_STEPS="2", PYTHONPATH=str(tmp_path)
    )  # fmt: skip
    assert found["listeners"] == []
    assert found["packets"] == []


def test_with_local_sources_the_whole_job_sends_no_packet_and_looks_up_no_name(job: Job, tmp_path: Path) -> None:
    found = in_a_namespace(job, tmp_path, HF_HUB_OFFLINE="0", FT_MAX_STEPS="2")
    assert found["packets"] == []
    assert found["listeners"] == []


def test_the_names_file_of_plan_and_status_reach_nobody_for_local_sources(job: Job, tmp_path: Path) -> None:
    assert in_a_namespace(job, tmp_path, "plan", HF_HUB_OFFLINE="0")["packets"] == []


_WITH_A_HUB = """
import os, subprocess, sys
from pathlib import Path
from tests.fake_hub import FakeHub

with FakeHub() as hub:
    hub.add("models/me/base", Path(os.environ["FT_MODEL_NAME"]))
    asked = {**os.environ, "HF_ENDPOINT": hub.url, "FT_MODEL_NAME": "me/base", "HF_HUB_OFFLINE": "0"}
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=asked).returncode)
"""


def test_plan_of_a_hub_model_contacts_the_endpoint_alone(job: Job, tmp_path: Path) -> None:
    (tmp_path / "with_a_hub.py").write_text(_WITH_A_HUB, encoding="utf-8")
    found = in_a_namespace(job, tmp_path, "plan", through=[str(tmp_path / "with_a_hub.py")])
    assert found["packets"] == []


def test_idle_connections_stop_neither_the_probe_nor_the_process() -> None:
    port = free_port()
    Metrics("a-run", 60).serve("127.0.0.1", port)
    idle = []
    for _ in range(400):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(b"GET /heal")  # and never the rest
        idle.append(connection)
    before = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
        probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = probe.recv(100)
    assert b"200 OK" in answer and time.monotonic() - before < 2
    mine = len(os.listdir("/proc/self/fd")) - len(idle)  # noqa: PTH208
    assert mine < 200, "the server kept what it should have closed"
    for connection in idle:
        connection.close()


def test_the_metrics_port_can_be_bound_to_one_address() -> None:
    port = free_port()
    Metrics("a-run", 60).serve("127.0.0.2", port)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", port)) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("file", ["k8s/finetune-job.yaml", "k8s/finetune-multinode.yaml"])
def test_each_manifest_lets_nobody_in_but_to_the_metrics_and_its_own_nodes(file: str) -> None:
    import yaml

    objects = {item["kind"]: item for item in yaml.safe_load_all((ROOT / file).read_text(encoding="utf-8"))}
    policy, labels = objects["NetworkPolicy"]["spec"], objects["Job"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert (
            rule.get("ports") == [{"port": "metrics"}]
            or rule["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()
        )
