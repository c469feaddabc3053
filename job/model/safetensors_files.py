"""Weights on disk: reading those of a model tensor by tensor, and writing shards that are hashed on the way.

The format is that of safetensors: eight bytes with the header's length, a JSON header with each tensor's type, shape and
place, then the bytes (github.com/huggingface/safetensors, "Format"). Writing it here keeps no more than one tensor in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
_COMPUTED = ".rotary_emb.inv_freq"  # stored by older versions of transformers; config.json says what it is
_ALIGNMENT = 8
_BYTES_AHEAD = 384 << 20


class Weights:
    """The weights of a safetensors model, sharded or not. Nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        if index.is_file() and not (folder / SINGLE).is_file():  # transformers looks for the single file first
            self._files: dict[str, Path] = {
                name: folder / Path(file).name
                for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            }
        else:
            with safe_open(folder / SINGLE, framework="pt") as tensors:
                self._files = dict.fromkeys(tensors.keys(), folder / SINGLE)
        for name in [name for name in self._files if name.endswith(_COMPUTED)]:
            del self._files[name]
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors(name).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor `name`. Its memory is the file's: it is read as it is used, and must not be changed."""
        tensor: torch.Tensor = self._tensors(name).get_tensor(name)
        return tensor

    def _tensors(self, name: str) -> Any:
        """The file that holds `name`. It stays open, since its header lists every tensor."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


@dataclass(frozen=True)
class Tensor:
    """What is written under one name: the values are made by `make` when their turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int, go_on: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Write the tensors in their order, as few shards as hold at most `shard_bytes` each, with an index if there are several.

    Returns each file's SHA-256, taken from the bytes in memory and not from the disk. `go_on` is called between tensors,
    and raises to end the writing.
    """
    shards = _shards(tensors, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    hashes = {
        name: _write_shard(folder / name, {key: tensors[key] for key in shard}, go_on)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        (folder / INDEX).write_bytes(data)
        hashes[INDEX] = hashlib.sha256(data).hexdigest()
    return hashes


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.size
    return shards


def _made_ahead(tensors: Iterable[Tensor]) -> Iterator[torch.Tensor]:
    """The values of each tensor, made while those before it are written: a disk takes data in bursts."""
    with ThreadPoolExecutor(1) as pool:
        coming: deque[tuple[int, Future[torch.Tensor]]] = deque()
        try:
            for tensor in tensors:
                while coming and sum(size for size, _ in coming) + tensor.size > _BYTES_AHEAD:
                    yield coming.popleft()[1].result()
                coming.append((tensor.size, pool.submit(tensor.make)))
            while coming:
                yield coming.popleft()[1].result()
        finally:
            for _, future in coming:
                future.cancel()


def _write_shard(file: Path, tensors: Mapping[str, Tensor], go_on: Callable[[], None]) -> str:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with file.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as beside:
        for part in (len(text).to_bytes(8, "little"), text):
            stream.write(part)
            digest.update(part)
        for (name, tensor), values in zip(tensors.items(), _made_ahead(tensors.values()), strict=True):
            go_on()
            if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
                raise RuntimeError(
                    f"{name} became {values.dtype} {tuple(values.shape)}, not {tensor.dtype} {tensor.shape}"
                )
            data = values.contiguous().flatten().view(torch.uint8).numpy().data
            hashing = beside.submit(digest.update, data)
            written = 0
            while written < len(data):  # one call writes 2 GiB at most
                written += stream.write(data[written:])
            hashing.result()
    return digest.hexdigest()
