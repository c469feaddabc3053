"""Whether results are written to the container itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.cluster import is_in_container_layer
from tests.conftest import Job

MOUNTS = """overlay / overlay rw,lowerdir=/a:/b,upperdir=/c 0 0
proc /proc proc rw 0 0
/dev/sda1 /work ext4 rw 0 0
tmpfs /work/cache tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "lost"),
    [("/home/me/results", True), ("/work/results", False), ("/workshop", True), ("/work/cache/x", False), ("/", True)],
)
def test_a_folder_is_the_containers_own_unless_a_volume_is_mounted_above_it(
    tmp_path: Path, folder: str, lost: bool
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS, encoding="utf-8")
    assert is_in_container_layer(Path(folder), mounts) is lost
    mounts.write_text(MOUNTS.replace("overlay / overlay", "fuse-overlayfs / fuse.fuse-overlayfs"), encoding="utf-8")
    assert is_in_container_layer(Path(folder), mounts) is lost  # podman without root
    mounts.write_text(MOUNTS.replace("overlay / overlay", "/dev/sda2 / ext4"), encoding="utf-8")
    assert is_in_container_layer(Path(folder), mounts) is False
    assert is_in_container_layer(Path(folder), tmp_path / "absent") is False


def test_preflight_warns_of_a_store_that_is_lost_with_its_container(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from job.environment import load_settings
    from job.run import Run
    from job.stages import preflight

    for name, value in job.environment.items():
        monkeypatch.setenv(name, value)
    for lost in (True, False):
        monkeypatch.setattr(preflight, "is_in_container_layer", lambda folder, lost=lost: lost)
        preflight.preflight(Run.of(load_settings()))
        assert ("is inside this container" in capsys.readouterr().out) is lost
    monkeypatch.setattr(preflight, "is_in_container_layer", lambda folder: True)
    monkeypatch.setenv("FT_STORE_URL", "s3://bucket/runs")
    preflight._check_disk(Run.of(load_settings()), 0)
    assert "is inside this container" not in capsys.readouterr().out
