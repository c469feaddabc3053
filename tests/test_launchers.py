"""The Kubernetes manifest, the Slurm script and the image agree with the code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from job.errors import ExitCode
from job.settings import SECRET_VARIABLES, Settings, variable
from tests.conftest import ROOT

KNOWN = {variable(name) for name in Settings.model_fields}


def kubernetes_objects() -> dict[str, Any]:
    text = (ROOT / "k8s" / "finetune-job.yaml").read_text(encoding="utf-8")
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


@pytest.mark.parametrize(
    "file", ["k8s/finetune-job.yaml", "slurm/train.sh", "Dockerfile", "examples/demo.env", "README.md"]
)
def test_every_variable_that_is_named_is_a_known_setting(file: str) -> None:
    named = set(re.findall(r"\bFT_[A-Z0-9_]+\b", (ROOT / file).read_text(encoding="utf-8")))
    assert named - KNOWN - {"FT_"} == set()


def test_the_pod_failure_policy_is_the_exit_code_table() -> None:
    rules = kubernetes_objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    }
    assert actions == {65: "FailJob", 77: "FailJob", 78: "FailJob", 75: "Ignore", 69: "Count", 70: "Count"}
    assert set(actions) == {int(code) for code in ExitCode} - {0}


def test_the_pod_is_restricted_and_its_grace_is_longer_than_the_jobs() -> None:
    pod = kubernetes_objects()["Job"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    environment = {item["name"]: item for item in container["env"]}
    assert float(environment["FT_STOP_GRACE_SECONDS"]["value"]) < pod["terminationGracePeriodSeconds"]
    assert "job-name" in environment["FT_RUN_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_no_manifest_carries_a_secret() -> None:
    settings = kubernetes_objects()["ConfigMap"]["data"]
    assert not set(settings) & set(SECRET_VARIABLES)


def test_pid_1_is_tini_without_a_shell_between_and_the_user_is_not_root() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["tini", "--", "python3", "/app/entrypoint.py"]' in text
    assert "USER 10001:10001" in text


def test_the_slurm_script_requeues_what_can_be_tried_again_and_nothing_else() -> None:
    text = (ROOT / "slurm" / "train.sh").read_text(encoding="utf-8")
    cases = re.findall(r"^  (\d+)\)", text, re.MULTILINE)
    assert cases == ["75", "69"]
    assert 'exit "$code"' in text
