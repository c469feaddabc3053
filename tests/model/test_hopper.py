"""The GPU kernels that no test here can run do at least compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SPILLED = 100  # bytes, of the 130,000 in a program's registers


def test_kernels_compile_for_hopper_and_keep_their_sums_in_registers(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.hopper"], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {one["kernel"] for one in found}
    assert names == {
        "_forward_kernel", "_of_query_kernel", "_of_key_kernel", "_gated_narrow_kernel", "_gated_adapted_kernel",
        "_adamw_kernel",
    }  # fmt: skip
    assert [one for one in found if one["spilled"] > SPILLED] == []
