"""The merged model with 8-bit float weights, as compressed-tensors stores them and vLLM serves them.

Each row of a linear layer has its own scale; inputs are scaled token by token as they come. The head stays as it is.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from job.model.merge import skeleton
from job.model.safetensors_files import INDEX, Tensor, Weights, write_shards

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SHARD_BYTES = 4_000_000_000


def write_fp8(source: Path, target: Path, go_on: Callable[[], None]) -> None:
    """Write the model in `source` to `target` with its inner linear layers in FP8 (e4m3), tensor by tensor."""
    model = skeleton(source)
    head = model.get_output_embeddings()
    inner = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    stored = Weights(source)
    tensors: dict[str, Tensor] = {}
    for name in stored:
        shape, dtype = stored.shape(name), stored[name].dtype
        if name not in inner:
            tensors[name] = Tensor(shape, dtype, functools.partial(stored.__getitem__, name))
            continue
        tensors[name] = Tensor(shape, torch.float8_e4m3fn, functools.partial(_rounded, stored, name))
        scale = f"{name}_scale"
        tensors[scale] = Tensor((shape[0], 1), torch.float32, functools.partial(_scales, stored, name))
    write_shards(target, tensors, _SHARD_BYTES, go_on)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.name != INDEX:
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _described()
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _scales(stored: Weights, name: str) -> torch.Tensor:
    """What each row is divided by: its largest value becomes the largest that 8 bits hold."""
    largest = stored[name].float().abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / _LARGEST, 1.0)


def _rounded(stored: Weights, name: str) -> torch.Tensor:
    return (stored[name].float() / _scales(stored, name)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def _described() -> dict[str, object]:
    """`quantization_config` as compressed-tensors reads it (github.com/vllm-project/compressed-tensors)."""
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }  # fmt: skip
