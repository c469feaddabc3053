"""The manifests' pods, played by podman with what the Job controller, the cluster and the kubelet add."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import LIGHTHOUSE, ROOT
from tests.real.containers import IMAGE, Containers
from tests.supervision.test_interruptions import tree_of


def manifest_objects(file: str) -> dict[str, dict[str, Any]]:
    """Kind → object of a manifest."""
    return {item["kind"]: item for item in yaml.safe_load_all((ROOT / file).read_text(encoding="utf-8"))}


@contextmanager
def played(containers: Containers, documents: list[dict[str, Any]], network: str, folder: Path) -> Iterator[list[str]]:
    """Run the pods among `documents`; yields the names of their containers."""
    file = folder / "pods.yaml"
    file.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    containers.command("podman", "kube", "play", f"--network={network}", str(file))
    try:
        yield [f"{document['metadata']['name']}-finetune" for document in documents if document["kind"] == "Pod"]
    finally:
        containers.command("podman", "kube", "down", str(file), check=False)


def pod_of(job: dict[str, Any], index: int, work: Path, model: Path, *, shared_network: bool) -> dict[str, Any]:
    """The Job's template as one pod, since podman plays pods, not Jobs.

    Added are the labels and indices of the Job controller and a volume for the claim. There is no GPU.
    """
    name = job["metadata"]["name"]
    template = json.loads(json.dumps(job["spec"]["template"]))
    spec, container = template["spec"], template["spec"]["containers"][0]
    assert container["image"] == "finetune-job:0.2.0"
    container["image"] = IMAGE
    container["resources"]["limits"].pop("nvidia.com/gpu")
    for kind in ("requests", "limits"):  # this machine is smaller
        container["resources"][kind] = {"memory": "4Gi"}
    # podman would probe with a curl in the image (Kubelet probes instead), and map every port
    del container["livenessProbe"], container["ports"]
    if job["spec"].get("completionMode") == "Indexed":
        container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
    if shared_network:  # podman has no host names for pods, and on one host they share the ports
        for item in container["env"]:
            if item["name"] == "FT_MASTER_ADDR":
                item["value"] = "127.0.0.1"
            if item["name"] == "FT_METRICS_PORT":
                item["value"] = str(9400 + index)
    container["envFrom"] = [source for source in container["envFrom"] if "configMapRef" in source]
    container["volumeMounts"] += [
        {"name": "model", "mountPath": "/inputs/model", "readOnly": True},
        {"name": "data", "mountPath": "/inputs/lighthouse.jsonl", "readOnly": True},
    ]
    places = {"work": {"path": str(work), "type": "Directory"}, "model": {"path": str(model), "type": "Directory"}}
    places["data"] = {"path": str(LIGHTHOUSE), "type": "File"}
    for other in ("tmp", "shm"):
        folder = work.parent / f"{other}-{index}"
        folder.mkdir()
        folder.chmod(0o1777)
        places[other] = {"path": str(folder), "type": "Directory"}
    spec["volumes"] = [{"name": volume, "hostPath": place} for volume, place in places.items()]
    labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": name}
    metadata = {"name": f"{name}-{index}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


class Kubelet(threading.Thread):
    """Probes a container as its manifest says, and stops it after as many failures as a kubelet allows."""

    def __init__(self, containers: Containers, name: str, port: int, job: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        spec = job["spec"]["template"]["spec"]
        self._containers, self._name, self._port = containers, name, port
        self._probe, self._grace = spec["containers"][0]["livenessProbe"], spec["terminationGracePeriodSeconds"]
        self.answers: list[int] = []  # HTTP status codes; 0: no answer

    def run(self) -> None:
        time.sleep(self._probe["initialDelaySeconds"])
        failures = 0
        while self._running():
            self.answers.append(self._ask())
            failures = 0 if self.answers[-1] == 200 else failures + 1
            if failures == self._probe.get("failureThreshold", 3) and self._running():
                self._containers.command("podman", "stop", f"--time={self._grace}", self._name, check=False)
                return
            time.sleep(self._probe["periodSeconds"])

    def _running(self) -> bool:
        state = self._containers.command("podman", "inspect", "--format={{.State.Running}}", self._name, check=False)
        return state.stdout.strip() == "true"

    def _ask(self) -> int:
        address = f"http://127.0.0.1:{self._port}{self._probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(address, timeout=self._probe["timeoutSeconds"]) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refusal:
            return refusal.code
        except OSError:
            return 0


def suspend_stage(containers: Containers, name: str, reached: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for an event in the container's log, then suspend everything that the job has started."""
    init = int(containers.command("podman", "inspect", "--format={{.State.Pid}}", name).stdout)
    log = containers.start("logs", "--follow", name)
    assert log.stdout is not None
    try:
        if not any(reached(json.loads(line)) for line in log.stdout if line.startswith("{")):
            raise AssertionError(f"{name} ended before it was suspended")
        for process in tree_of(init)[2:]:  # not tini and the supervisor
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
    finally:
        log.kill()
        log.communicate()
