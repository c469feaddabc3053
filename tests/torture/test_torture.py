"""A small torture run as part of the tests. `make torture KILLS=200` is the large one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_a_few_kills_at_random_points_leave_no_trace_in_the_result() -> None:
    command = [sys.executable, "-m", "tests.torture", "--kills", "4", "--seed", "9", "--jobs", "1", "--only", "folder"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=800)
    closing = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout + done.stderr
    assert closing.endswith("PASSED")
    assert int(closing.split(": ")[1].split(" kills")[0]) >= 4
    assert "0 corrupt checkpoints" in closing
