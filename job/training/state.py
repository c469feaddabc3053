"""Saving nested Python values with tensors to one safetensors file. Without pickle, no code runs when it is loaded.

Tensors are the file's tensors. Everything else is JSON in the file's metadata, with tags for what JSON does not
support: tuples, keys that are not strings, numpy arrays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from job.errors import InputError

_METADATA_KEY = "tree"
_PLAIN = (type(None), bool, int, float, str)


def save_tree(tree: Any, file: Path) -> None:
    """Write dicts, lists, tuples, numbers, strings, None, tensors and numpy arrays, or raise TypeError."""
    tensors: dict[str, torch.Tensor] = {}
    spelled = _spell(tree, tensors)
    save_file(tensors, file, metadata={_METADATA_KEY: json.dumps(spelled)})


def to_bytes(tree: Any) -> bytes:
    """What `save_tree` would write."""
    tensors: dict[str, torch.Tensor] = {}
    spelled = _spell(tree, tensors)
    written: bytes = save(tensors, metadata={_METADATA_KEY: json.dumps(spelled)})
    return written


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. Raises ValueError for anything else."""
    size = int.from_bytes(data[:8], "little")
    spelled = json.loads(data[8 : 8 + size])["__metadata__"][_METADATA_KEY]
    return _build(json.loads(spelled), load(data))


def load_tree(file: Path) -> Any:
    """Read what `save_tree` wrote, with tensors on the CPU. Raises InputError for any other file."""
    try:
        with safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
            return _build(json.loads((reader.metadata() or {})[_METADATA_KEY]), tensors)
    except (FileNotFoundError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"The checkpoint file {file.name} cannot be read: {error!r}.",
            "Another version of this job may have written it. Continue with that version, or choose another FT_RUN_ID.",
        ) from error


def _spell(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().clone().contiguous()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        return {"array": _spell(torch.from_numpy(value.astype(np.int64)), tensors), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": [[_spell(key, tensors), _spell(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_spell(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_spell(item, tensors) for item in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__qualname__}")


def _build(spelled: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match spelled:
        case {"tensor": name}:
            return tensors[name]
        case {"array": array, "dtype": dtype}:
            return _build(array, tensors).numpy().astype(dtype)
        case {"dict": items}:
            return {_build(key, tensors): _build(item, tensors) for key, item in items}
        case {"tuple": items}:
            return tuple(_build(item, tensors) for item in items)
        case list():
            return [_build(item, tensors) for item in spelled]
        case _ if isinstance(spelled, _PLAIN):
            return spelled
    raise ValueError(f"unknown value {spelled!r}")
