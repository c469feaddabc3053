"""Power cuts on a real ext4: what `make torture` does sixty times, a few times."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, unavailable


# Never beside containers: their mount namespaces would keep the dead file system mounted, and a mount would bring it back.
@pytest.mark.xdist_group("image")
@pytest.mark.timeout(900)
def test_a_run_whose_power_is_cut_ends_with_the_right_model_and_never_calls_a_damaged_one_complete() -> None:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        unavailable("needs root, loop devices and mkfs.ext4")
    command = [sys.executable, "-m", "tests.torture.power", "--losses", "6", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.strip().splitlines()[-1]
    assert closing.endswith("PASSED") and "0 corrupt commits" in closing
