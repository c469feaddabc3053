"""Importing the libraries takes less time."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

_SCRIPT = """
import sys
import torch
compiler = torch.compile
{first}
import peft, bitsandbytes
assert torch.compile is compiler
print("torch._inductor.compile_fx" in sys.modules)
quantized, state = bitsandbytes.functional.quantize_4bit(torch.eye(64), quant_type="nf4")
assert torch.equal(bitsandbytes.functional.dequantize_4bit(quantized, state), torch.eye(64))
"""
_UNCOMPILED = "from job.model.startup import import_bitsandbytes_uncompiled; import_bitsandbytes_uncompiled()"


def imports_the_compiler(first: str) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(first=first)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True"


def test_bitsandbytes_is_imported_without_torchs_compiler_and_computes_as_before() -> None:
    assert not imports_the_compiler(_UNCOMPILED)
    assert imports_the_compiler("pass"), "it is no longer imported by default: remove job/model/startup.py"
