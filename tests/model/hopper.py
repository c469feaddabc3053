"""Compile the kernels for Hopper without a GPU: `python -m tests.model.hopper`.

It prints one line of JSON per kernel, with its name and how many bytes of registers it spills.

The other tests use Triton's interpreter, which accepts more than its compiler does. The interpreter's switch is read
when Triton is imported, so this is a separate program.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from job.model.fused import attention_kernels, gate_kernels
from job.training import adamw_kernel

_SHARED_BYTES = 232_448  # the most shared memory of a program
_HALF, _WIDE, _WHOLE = "*bf16", "*fp32", "i32"
_TENSORS = {"sums": _WIDE, "normalisers": _WIDE, "products": _WIDE, "tiles": "*i32", "parameters": "*i64"}
_FACTORS = ("scale", "by", "gate_scale", "up_scale", "beta_mean", "beta_square", "epsilon", "step_size", "shrunk")
_TENSOR_NAMES = (
    "query", "key", "value", "out", "of_out", "of_query", "of_key", "of_value", "cos", "sin", "like", "like_gradient"
)  # fmt: skip


def kernels() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Each kernel with the tiles it loads by descriptors, its constants and its warps, as launched for a 7B."""
    for tuned, kernel, loaded in (
        (attention_kernels.FORWARD, attention_kernels._forward_kernel, ("key", "value")),
        (attention_kernels.OF_QUERY, attention_kernels._of_query_kernel, ("key", "value")),
        (attention_kernels.OF_KEY, attention_kernels._of_key_kernel, ("query", "of_out")),
    ):
        for described in (True, False):
            tile = f"tensordesc<bf16[{tuned.other}, 128]>"
            constants = {
                "GROUP": 1,
                "DIM": 128,
                "OWN": attention_kernels.OWN,
                "OTHER": tuned.other,
                "STAGES": tuned.stages,
                "DESCRIBED": described,
            }
            if kernel is not attention_kernels._forward_kernel:
                constants["ROTATED"] = described  # fmt: skip
            yield kernel, dict.fromkeys(loaded, tile) if described else {}, constants, tuned.warps
    yield adamw_kernel._adamw_kernel, {}, {"BLOCK": 1024}, 4
    for ranks in (64, 128):
        narrow, adapted = gate_kernels.GATED_NARROW, gate_kernels.GATED_ADAPTED
        tiles = {"gate_up": (narrow.rows, narrow.block), "a": (ranks, narrow.block)}
        yield gate_kernels._gated_narrow_kernel, _descriptors(tiles), _constants(narrow, ranks), narrow.warps
        tiles = dict.fromkeys(("gate_up", "gradient"), (adapted.rows, adapted.block))
        tiles |= dict.fromkeys(("of_down", "narrow_gate", "narrow_up"), (adapted.rows, ranks))
        for trained in ((True, True, True), (False, False, False), (False, True, False)):
            constants = {**_constants(adapted, ranks), **dict(zip(("DOWN", "GATE", "UP"), trained, strict=True))}
            yield gate_kernels._gated_adapted_kernel, _descriptors(tiles), constants, adapted.warps * ranks // 64


def _descriptors(tiles: dict[str, tuple[int, int]]) -> dict[str, str]:
    return {name: f"tensordesc<bf16[{rows}, {columns}]>" for name, (rows, columns) in tiles.items()}


def _constants(tuned: gate_kernels.Tuned, ranks: int) -> dict[str, Any]:
    return {"ROWS": tuned.rows, "BLOCK": tuned.block, "RANKS": ranks, "STAGES": tuned.stages, "GELU": False}


def compiled(kernel: Any, loaded: dict[str, str], constants: dict[str, Any], warps: int) -> Any:
    """The kernel for an H100."""
    function = kernel._function
    types, aligned = {}, {}
    for place, name in enumerate(function.arg_names):
        kind = loaded.get(name) or _TENSORS.get(name) or (_HALF if name in _TENSOR_NAMES else _WHOLE)
        types[name] = "constexpr" if name in constants else "fp32" if name in _FACTORS else kind
        if types[name].startswith("*") or types[name] == _WHOLE:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function, signature=types, attrs=aligned,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


def spilled(kernel: Any) -> int:
    """Bytes of registers that the assembler spills to memory."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        told = subprocess.run(
            [str(assembler), "-arch=sm_90a", "-v", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    assert kernel.metadata.shared <= _SHARED_BYTES, kernel.metadata.shared
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", told)))


if __name__ == "__main__":
    for kernel, loaded, constants, warps in kernels():
        told = {
            "kernel": kernel._function.__name__,
            **constants,
            "spilled": spilled(compiled(kernel, loaded, constants, warps)),
        }
        print(json.dumps(told), flush=True)
