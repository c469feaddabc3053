"""A driver or a card that is too old for the image's CUDA is named before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch

from job import gpus
from job.errors import ExitCode, NodeError
from job.gpus import cuda_build, driver_problem
from job.model.device import device_of
from job.settings import Settings
from tests.conftest import Job


@dataclass
class Nvml:
    """What a driver would say of a machine with one card."""

    driver: str
    cuda: int
    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    display: tuple[int, int] | None = None  # the compute capability of a second card


Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    def make(*arguments: Any) -> None:
        told = Nvml(*arguments)
        for name, value in {
            "nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 1 if told.display is None else 2,
            "nvmlSystemGetDriverVersion": told.driver, "nvmlSystemGetCudaDriverVersion_v2": told.cuda,
            "nvmlDeviceGetName": told.name, "nvmlDeviceGetUUID": "GPU-1",
        }.items():  # fmt: skip
            monkeypatch.setattr(pynvml, name, lambda *_, found=value: found)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        capabilities = [told.capability, told.display]
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", capabilities.__getitem__)

    return make


@pytest.mark.parametrize(
    ("driver", "supported", "told"),
    [
        (
            "570.86.10",
            12080,
            "driver 570.86.10 supports CUDA 12.8, and this build (CUDA 13.0) needs driver 580 or newer",
        ),
        (
            "550.54.14",
            12040,
            "driver 550.54.14 supports CUDA 12.4, and this build (CUDA 13.0) needs driver 580 or newer",
        ),
        (
            "470.57.02",
            11040,
            "driver 470.57.02 supports CUDA 11.4, and this build (CUDA 13.0) needs driver 580 or newer",
        ),
        ("580.65.06", 13000, None),
        ("570.86.10", 13000, None),  # with cuda-compat
        ("590.1", 13010, None),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_the_one_that_is_needed(
    machine: Machine, driver: str, supported: int, told: str | None
) -> None:
    machine(driver, supported)
    assert driver_problem("13.0") == told
    older = None if supported >= 12000 else told.replace("13.0", "12.8").replace("580", "525") if told else None
    assert driver_problem("12.8") == older


def test_a_card_that_is_too_old_is_named(machine: Machine) -> None:
    machine("580.65.06", 13000, "Tesla V100-SXM2-16GB", (7, 0))
    assert driver_problem("13.0") == (
        "the Tesla V100-SXM2-16GB has compute capability 7.0, and this build (CUDA 13.0) needs 7.5 or newer"
    )
    assert driver_problem("12.6") is None and driver_problem("12.8") is None
    machine("580.65.06", 13000, "Tesla P100-PCIE-16GB", (6, 0))
    assert driver_problem("12.6") is None
    assert driver_problem("12.8") == (
        "the Tesla P100-PCIE-16GB has compute capability 6.0, and this build (CUDA 12.8) needs 7.0 or newer"
    )
    machine("580.65.06", 13000, "Tesla T4", (7, 5))
    assert driver_problem("13.0") is None


def test_an_old_card_beside_a_new_one_is_no_problem_unless_it_is_the_only_one_to_use(machine: Machine) -> None:
    machine("580.65.06", 13000, "NVIDIA GeForce GTX 1080", (8, 9), (6, 1))
    assert driver_problem("13.0", {}) is None
    assert driver_problem("13.0", {"CUDA_VISIBLE_DEVICES": "0"}) is None
    assert "compute capability 6.1" in str(driver_problem("13.0", {"CUDA_VISIBLE_DEVICES": "1"}))
    assert driver_problem("13.0", {"CUDA_VISIBLE_DEVICES": ""}) is None


def test_the_driver_is_too_old_for_a_slice_of_a_card_too(machine: Machine) -> None:
    """Slurm names slices (MIG), which the driver's list of cards does not have."""
    machine("570.86.10", 12080)
    assert "needs driver 580" in str(driver_problem("13.0", {"CUDA_VISIBLE_DEVICES": "MIG-5a2b"}))


def test_only_the_cards_that_the_job_may_use_are_measured_under_their_own_numbers(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("580.65.06", 13000, "NVIDIA H100 80GB HBM3", (9, 0), (9, 0))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetIndex", lambda card: card)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda card: SimpleNamespace(used=card + 1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda card: SimpleNamespace(gpu=50 * card))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda card: 100_000)
    assert gpus.gpu_states({"CUDA_VISIBLE_DEVICES": "1"}) == {1: gpus.GpuState(2, 0.5, 100.0)}
    assert sorted(gpus.gpu_states({})) == [0, 1]


def test_a_build_for_the_cpu_a_machine_without_a_driver_and_an_unknown_cuda_are_no_problem(machine: Machine) -> None:
    assert driver_problem("13.0") is None, "there is no driver here"
    machine("550.54.14", 12040)
    assert driver_problem(None) is None
    assert driver_problem("14.0") is None


def test_the_build_is_read_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is None:
        assert cuda_build() is None
    versions = {"nvidia-cuda-runtime": "13.0.96"}
    monkeypatch.setattr(gpus.importlib.metadata, "version", lambda name: versions[name])
    assert cuda_build() == "13.0"


def test_preflight_and_training_name_the_driver_instead_of_saying_that_there_is_no_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("570.86.10", 12080)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(NodeError, match=r"FT_DEVICE=cuda, but driver 570\.86\.10 supports CUDA 12\.8") as raised:
        device_of(Settings(device="cuda"), 0)
    assert raised.value.exit_code == ExitCode.NODE_UNFIT
    assert device_of(Settings(device="cpu"), 0).type == "cpu"


def test_a_machine_without_a_gpu_says_so(job: Job) -> None:
    refused = job.run(FT_DEVICE="cuda", FT_STAGES="preflight")
    assert refused.code == 69
    assert "torch sees no GPU" in refused.error["message"]
