"""A real image, built by buildah on a debootstrap base, and real containers, run by podman and runc."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

NEEDED = ("buildah", "podman", "runc", "debootstrap", "catatonit")
IMAGE = "localhost/finetune-job:0.2.0"
_BASE = "localhost/base:bookworm"


@dataclass(frozen=True)
class Containers:
    """buildah and podman with their own storage below `folder`."""

    folder: Path

    def command(self, *arguments: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(arguments, env=self.environment(), capture_output=True, text=True, timeout=timeout)
        assert result.returncode == 0 or not check, f"{arguments}: {result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["podman", *arguments], env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
        }

    def configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        storage = f'[storage]\ndriver="overlay"\nrunroot="{self.folder}/run"\ngraphroot="{self.folder}/graph"\n'
        engine = '[engine]\ncgroup_manager="cgroupfs"\nevents_logger="file"\nruntime="runc"\n'
        limits = '[containers]\ncgroups="enabled"\nlog_driver="k8s-file"\ndefault_ulimits=["nofile=20000:20000","nproc=20000:20000"]\n'
        (self.folder / "storage.conf").write_text(storage, encoding="utf-8")
        (self.folder / "containers.conf").write_text(limits + engine, encoding="utf-8")

    def has(self, image: str) -> bool:
        return self.command("podman", "image", "exists", image, check=False).returncode == 0

    def make_base(self) -> None:
        """Make a minimal Debian with Python. No registry is needed."""
        if self.has(_BASE):
            return
        root, archive = self.folder / "rootfs", self.folder / "base.tar"
        packages = "python3,python3-venv,ca-certificates"
        self.command("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root))
        self.command("tar", "-C", str(root), "-cf", str(archive), ".")
        self.command("podman", "import", str(archive), _BASE)
        shutil.rmtree(root)
        archive.unlink()

    def build(self, checkout: Path = ROOT, image: str = IMAGE) -> None:
        """Build a checkout's Dockerfile with PyTorch's CPU build. Every wheel's hash is checked."""
        options, wheels = [], _local_wheels()
        if wheels is not None:
            (self.folder / "pip.conf").write_text("[global]\nfind-links = /mnt/wheels\n", encoding="utf-8")
            options = ["--volume", f"{wheels}:/mnt/wheels:ro", "--secret", f"id=pip,src={self.folder}/pip.conf"]
        authorities = Path("/etc/ssl/certs/ca-certificates.crt")
        if authorities.exists():
            options += ["--secret", f"id=ca,src={authorities}"]
        arguments = {"BASE_IMAGE": _BASE, "REQUIREMENTS": "requirements-cpu.txt"}
        for name, value in arguments.items():
            options += ["--build-arg", f"{name}={value}"]
        self.command(
            "buildah",
            "bud",
            "--layers",
            "--isolation",
            "chroot",
            "--network",
            "host",
            *options,
            "-t",
            image,
            str(checkout),
            timeout=1800,
        )


def _local_wheels() -> Path | None:
    """The folder of wheels that pip searches on this machine, if any. It may hold PyTorch's CPU build."""
    listed = subprocess.run(
        ["pip", "config", "get", "global.find-links"], capture_output=True, text=True
    ).stdout.split()
    listed += os.environ.get("PIP_FIND_LINKS", "").split()
    folders = [
        Path(urllib.parse.urlparse(place).path) for place in listed if "://" not in place or place.startswith("file:")
    ]
    return next((folder for folder in folders if folder.is_dir()), None)
