"""The Kubernetes manifest, the Slurm script and the image agree with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import ExitCode
from job.guard.secrets import KNOWN as SECRET_VARIABLES
from job.settings import Settings, variable
from tests.conftest import ROOT, unavailable

KNOWN = {variable(name) for name in Settings.model_fields}
MANIFESTS = ("k8s/finetune-job.yaml", "k8s/finetune-multinode.yaml")


def kubernetes_objects(file: str) -> dict[str, Any]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


def kustomized(folder: Path) -> dict[str, Any]:
    if shutil.which("kubectl") is None:
        unavailable("needs kubectl")
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return {item["kind"]: item for item in yaml.safe_load_all(built.stdout)}


def environment_of(objects: dict[str, Any]) -> dict[str, Any]:
    container = objects["Job"]["spec"]["template"]["spec"]["containers"][0]
    return {item["name"]: item for item in container["env"]}


@pytest.mark.parametrize(
    "file",
    [*MANIFESTS, "k8s/README.md", "slurm/train.sh", "Dockerfile", "examples/demo.env", "README.md"],
)
def test_every_named_variable_is_a_known_setting(file: str) -> None:
    named = set(re.findall(r"\bFT_[A-Z0-9_]+\b", (ROOT / file).read_text(encoding="utf-8")))
    assert named - KNOWN - {"FT_"} == set()


@pytest.mark.parametrize("file", MANIFESTS)
def test_the_pod_failure_policy_is_the_exit_code_table(file: str) -> None:
    rules = kubernetes_objects(file)["Job"]["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    }
    assert actions == {65: "FailJob", 77: "FailJob", 78: "FailJob", 75: "Ignore", 69: "Count", 70: "Count"}
    assert set(actions) == {int(code) for code in ExitCode} - {0}


@pytest.mark.parametrize("file", MANIFESTS)
def test_a_disruption_is_never_counted_and_what_cannot_succeed_is_never_tried_again(file: str) -> None:
    """The first rule that matches decides. A pod whose node is reclaimed may end with 69 meanwhile, or with 65."""
    rules = kubernetes_objects(file)["Job"]["spec"]["podFailurePolicy"]["rules"]
    kinds = ["disruption" if "onPodConditions" in rule else rule["action"] for rule in rules]
    assert kinds == ["FailJob", "disruption", "Ignore", "Count"]
    (disruption,) = (rule for rule in rules if "onPodConditions" in rule)
    assert disruption == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_each_node_of_an_indexed_job_waits_by_itself() -> None:
    """With a backoffLimit, eight nodes that all end with 75 once wait 600 s for their new pods, and 10 s with these limits."""
    spec = kubernetes_objects("k8s/finetune-multinode.yaml")["Job"]["spec"]
    assert "backoffLimit" not in spec
    assert spec["backoffLimitPerIndex"] > 0 and spec["maxFailedIndexes"] == 0


@pytest.mark.parametrize("file", MANIFESTS)
def test_nothing_moves_a_running_pod_to_save_a_node(file: str) -> None:
    annotations = kubernetes_objects(file)["Job"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_an_ephemeral_volume_leaves_no_claim_and_pins_no_zone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kustomization.yaml").write_text(
        "nameSuffix: -again\nresources: [../k8s]\ncomponents: [../k8s/ephemeral]\n", encoding="utf-8"
    )
    objects = kustomized(tmp_path / "run")
    assert "PersistentVolumeClaim" not in objects
    plain = kubernetes_objects(MANIFESTS[0])
    volumes = {volume["name"]: volume for volume in objects["Job"]["spec"]["template"]["spec"]["volumes"]}
    claim = volumes["work"]["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim == plain["PersistentVolumeClaim"]["spec"]
    assert set(volumes["work"]) == {"name", "ephemeral"} and set(volumes) == {"work", "tmp", "shm"}


@pytest.mark.parametrize("file", MANIFESTS)
def test_the_pod_is_restricted_and_its_grace_period_is_longer_than_the_jobs(file: str) -> None:
    objects = kubernetes_objects(file)
    spec = objects["Job"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"nvidia.com/gpu", "ephemeral-storage", "memory"} <= set(container["resources"]["limits"])
    environment = environment_of(objects)
    assert float(objects["ConfigMap"]["data"]["FT_STOP_GRACE_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    assert "job-name" in environment["FT_RUN_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert container["ports"][0]["containerPort"] == int(environment["FT_METRICS_PORT"]["value"])


def test_the_indexed_job_has_as_many_nodes_as_it_declares_and_they_find_the_first() -> None:
    objects = kubernetes_objects("k8s/finetune-multinode.yaml")
    spec, service = objects["Job"]["spec"], objects["Service"]
    environment = environment_of(objects)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["FT_NNODES"]["value"])
    name, subdomain = objects["Job"]["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert environment["FT_MASTER_ADDR"]["value"] == f"{name}-0.{subdomain}"
    assert service["metadata"]["name"] == subdomain and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["ports"][0]["port"] == int(environment["FT_MASTER_PORT"]["value"])
    assert objects["ConfigMap"]["data"]["FT_STORE_URL"].startswith("s3://")  # pods do not share their own folders


@pytest.mark.parametrize("file", MANIFESTS)
def test_no_manifest_carries_a_secret(file: str) -> None:
    settings = kubernetes_objects(file)["ConfigMap"]["data"]
    assert not set(settings) & set(SECRET_VARIABLES)


def test_an_overlay_sets_image_namespace_name_and_settings_without_editing(tmp_path: Path) -> None:
    """This is the overlay that k8s/README.md shows."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    readme = (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)
    assert shown is not None
    (tmp_path / "my-run").mkdir()
    (tmp_path / "my-run" / "kustomization.yaml").write_text(shown[1], encoding="utf-8")
    objects = kustomized(tmp_path / "my-run")
    job = objects["Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["metadata"] == {"name": "finetune-guanaco-2", "namespace": "training"}
    assert container["image"] == "registry.example.com/me/finetune-job:0.2.0"
    assert container["envFrom"][0]["configMapRef"]["name"] == "finetune-settings-guanaco-2"
    assert objects["ConfigMap"]["data"]["FT_STORE_URL"] == "s3://my-bucket/runs"
    claim = job["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"] == "finetune-work-guanaco-2"


def test_kueue_alone_decides_when_a_job_is_suspended(tmp_path: Path) -> None:
    """It suspends a new Job with its label by itself. An overlay that says so too would suspend a running one."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kustomization.yaml").write_text(
        "resources: [../k8s]\ncomponents: [../k8s/kueue]\n", encoding="utf-8"
    )
    job = kustomized(tmp_path / "run")["Job"]
    assert "suspend" not in job["spec"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["podFailurePolicy"] == kubernetes_objects(MANIFESTS[0])["Job"]["spec"]["podFailurePolicy"]


@pytest.mark.parametrize("component", ["openshift", "infiniband", "efa", "ephemeral", "kueue"])
def test_every_component_fits_the_manifest_and_readme_names_it(tmp_path: Path, component: str) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "run").mkdir()
    base = "../k8s/finetune-multinode.yaml" if component in ("infiniband", "efa") else "../k8s"
    if base.endswith(".yaml"):
        shutil.copy2(tmp_path / "k8s" / "finetune-multinode.yaml", tmp_path / "run")
        base = "finetune-multinode.yaml"
    text = f"resources: [{base}]\ncomponents: [../k8s/{component}]\n"
    (tmp_path / "run" / "kustomization.yaml").write_text(text, encoding="utf-8")
    objects = kustomized(tmp_path / "run")
    spec = objects["Job"]["spec"]["template"]["spec"]
    container = spec["containers"][0]
    if component == "openshift":
        assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if component in ("infiniband", "efa"):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
        assert spec["securityContext"]["runAsUser"] == 0  # nobody else gets what is added
        assert spec["securityContext"]["runAsNonRoot"] is False
        assert {name.partition("/")[0] for name in container["resources"]["limits"]} > {"nvidia.com"}
    assert f"`{component}/`" in (ROOT / "k8s" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", MANIFESTS)
def test_one_monitor_scrapes_all_runs_of_a_namespace(file: str) -> None:
    """One per run would scrape each pod as often as there are runs, and every alert would fire as often."""
    text = (ROOT / "k8s" / "monitoring" / "kustomization.yaml").read_text(encoding="utf-8")
    assert "kind: Kustomization" in text, "a Component would be part of each run's overlay"
    objects = kustomized(ROOT / "k8s" / "monitoring")
    assert set(objects) == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    template = kubernetes_objects(file)["Job"]["spec"]["template"]
    assert objects["PodMonitor"]["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert objects["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] in ports


def test_pid_1_is_tini_with_no_shell_in_between_and_the_user_is_not_root() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["tini", "--", "python3", "/app/entrypoint.py"]' in text
    assert "USER 10001:10001" in text


def test_every_base_image_is_pinned_by_its_digest() -> None:
    """A tag may point to another image tomorrow."""
    places = [ROOT / "Dockerfile", ROOT / "docs" / "operations.md"]
    bases = [base for place in places for base in re.findall(r"nvidia/cuda\S+", place.read_text(encoding="utf-8"))]
    assert len(bases) == 2
    assert all(re.fullmatch(r"nvidia/cuda:[\w.-]+@sha256:[0-9a-f]{64}", base) for base in bases), bases


def locked(file: str) -> set[tuple[str, str]]:
    """The packages and versions of a lock, each with a hash."""
    text = (ROOT / file).read_text(encoding="utf-8")
    wanted = re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    assert re.findall(r"^([a-z0-9._-]+)==(\S+)[^\n]*\\\n\s+--hash=sha256:[0-9a-f]{64}\b", text, re.MULTILINE) == wanted
    return {(name, version.removesuffix("+cpu")) for name, version in wanted}


def test_the_locks_pin_every_requirement_at_the_same_version_and_hash_every_line() -> None:
    asked = dict(
        re.findall(r"^([a-z0-9_-]+)==(\S+)$", (ROOT / "requirements.in").read_text(encoding="utf-8"), re.MULTILINE)
    )
    cuda, cpu, older = (locked(file) for file in ("requirements.txt", "requirements-cpu.txt", "requirements-cu128.txt"))
    torch = {"torch": re.findall(r"^CUDA_12_TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[0]}
    for lock, expected in ((cuda, asked), (cpu, asked), (older, asked | torch)):
        names = {name.replace("_", "-"): version for name, version in lock}
        assert {name: names.get(name.replace("_", "-")) for name in asked} == expected
    assert cpu <= cuda
    assert {name for name, _ in cuda - cpu if not name.startswith(("nvidia-", "cuda-"))} == {"triton"}
    differs = {name for name, _ in older ^ cuda if not name.startswith(("nvidia-", "cuda-"))}
    assert differs == {"torch", "triton"}
