"""What the files beside a model's weights may say. They are a stranger's, and libraries believe them.

Each is checked before a library reads it: sizes, nesting, the numbers that memory and time follow from, and the fields
that would load something else. A fault is an InputError that names the file and the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.errors import InputError
from job.guard.limits import TooMuch, bounded_json

_MIB = 1 << 20
_LARGEST = {
    "config.json": _MIB, "generation_config.json": _MIB, "tokenizer_config.json": 32 * _MIB, "tokenizer.json": 256 * _MIB,
    "special_tokens_map.json": 4 * _MIB, "added_tokens.json": 32 * _MIB, "model.safetensors.index.json": 64 * _MIB,
    "chat_template.jinja": _MIB, "vocab.json": 128 * _MIB, "merges.txt": 128 * _MIB, "tokenizer.model": 64 * _MIB,
}  # fmt: skip
_TEXT = ("chat_template.jinja", "merges.txt", "tokenizer.model")  # not JSON
_NUMBERS = {
    "num_hidden_layers": 1024, "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_attention_heads": 4096,
    "num_key_value_heads": 4096, "head_dim": 4096, "vocab_size": 1 << 22, "max_position_embeddings": 1 << 28,
    "num_experts": 1 << 14, "num_local_experts": 1 << 14,
}  # fmt: skip
_TYPES = {"float32", "float16", "bfloat16", "float64", None}
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", None}
_MOST_ADDED_TOKENS = 20_000
_MOST_GROWTH = 64.0  # how much longer normalizers may make a text


def check(folder: Path) -> None:
    """Raise InputError for a model whose files ask for something that no model needs."""
    for name, largest in _LARGEST.items():
        file = folder / name
        if not file.is_file():
            continue
        if name in _TEXT:
            if file.stat().st_size > largest:
                raise _refused(name, f"it has {file.stat().st_size:,} bytes, and {largest:,} are the most")
            continue
        found = read(file, largest)
        if name == "config.json":
            check_config(found)
        elif name == "tokenizer.json":
            _check_tokenizer(found)
        elif name == "tokenizer_config.json":
            _check_tokenizer_config(found)
        elif name == "model.safetensors.index.json":
            _check_index(found, folder)


def read(file: Path, largest: int | None = None) -> dict[str, Any]:
    """A JSON object from one of these files."""
    limit = largest or _LARGEST.get(file.name, _MIB)
    try:
        if file.stat().st_size > limit:
            raise TooMuch(f"it has {file.stat().st_size:,} bytes, and {limit:,} are the most")
        found = bounded_json(file.read_bytes(), limit)
    except ValueError as error:
        raise _refused(file.name, f"it cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise _refused(file.name, "it is not a JSON object")
    return found


def check_config(config: Mapping[str, Any]) -> None:
    """The numbers and names in a config.json, its text part's too."""
    parts = [config, *(part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), dict))]
    for part in parts:
        for name, most in _NUMBERS.items():
            value = part.get(name)
            if value is not None and not (type(value) is int and 0 < value <= most):
                raise _refused(
                    "config.json", f"{name} is {str(value)[:60]!r}: must be a whole number from 1 to {most:,}"
                )
        for name, value in part.items():
            if name.strip("_").endswith(("attn_implementation", "experts_implementation")) and not _known(
                value, _ATTENTION
            ):
                raise _refused("config.json", f"{name} is {str(value)[:60]!r}, which would load code")
        for name in ("dtype", "torch_dtype"):
            if not _known(part.get(name), _TYPES):
                raise _refused("config.json", f"{name} is {str(part.get(name))[:60]!r}, which is not a type of weights")
    if config.get("model_type") in _TRANSPOSED:
        raise InputError(
            f"The model is a {config['model_type']}, whose layers hold their weights transposed: this job does not merge adapters of them.",
            "Set FT_MODEL_NAME to a Llama or another decoder with linear layers.",
        )
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list)
        and all(isinstance(name, str) for name in architectures)
        and len(architectures) < 9
    ):
        raise _refused("config.json", "architectures is not a list of names")
    for name in ("quantization_config", "rope_scaling", "rope_parameters"):
        if not isinstance(config.get(name), dict | None):
            raise _refused("config.json", f"{name} is not an object")
    _check_quantization(config.get("quantization_config") or {})


def _check_quantization(stored: Mapping[str, Any]) -> None:
    """Weights may be stored in 16 bits, or in bitsandbytes' 4 bits, from which the merge computes 16-bit ones."""
    method = str(stored.get("quant_method") or ("bitsandbytes" if stored.get("load_in_4bit") else "none")).lower()
    if stored and not (method == "bitsandbytes" and stored.get("load_in_4bit") is True):
        raise InputError(
            f"The model's weights are stored quantized with {method[:40]}, on which this job cannot train.",
            "Set FT_MODEL_NAME to the same model in 16 bits, or in bitsandbytes' 4 bits.",
        )


def _known(value: Any, allowed: set[Any]) -> bool:
    return value is None or (isinstance(value, str) and value in allowed)


def _check_index(index: Mapping[str, Any], folder: Path) -> None:
    """The weights must be in files of the model itself."""
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise _refused("model.safetensors.index.json", "weight_map does not name a file for each weight")
    for name in sorted(set(weights.values())):
        if "/" in name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise _refused("model.safetensors.index.json", f"{name[:80]!r} is not one of the model's weight files")


def _check_tokenizer_config(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name.endswith("_file") and isinstance(value, str) and ("/" in value or "\\" in value):
            raise _refused("tokenizer_config.json", f"{name} is {value[:60]!r}, which is not a file of the model")
    added = config.get("added_tokens_decoder")
    if isinstance(added, dict) and len(added) > _MOST_ADDED_TOKENS:
        raise _refused("tokenizer_config.json", f"{len(added):,} added tokens: {_MOST_ADDED_TOKENS:,} are the most")
    template = config.get("chat_template")
    if isinstance(template, str) and len(template) > _LARGEST["chat_template.jinja"]:
        raise _refused("tokenizer_config.json", f"a chat template of {len(template):,} characters")


def _check_tokenizer(tokenizer: Mapping[str, Any]) -> None:
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > _MOST_ADDED_TOKENS:
        raise _refused("tokenizer.json", f"more than {_MOST_ADDED_TOKENS:,} added tokens, or none that can be read")
    growth = _growth(tokenizer.get("normalizer"))
    if growth > _MOST_GROWTH:
        raise _refused("tokenizer.json", f"its normalizers make a text up to {growth:,.0f} times as long")


def _growth(normalizer: Any) -> float:
    """How many times as long a text may become, at most."""
    if not isinstance(normalizer, dict):
        return 1.0
    if normalizer.get("type") == "Sequence":
        total = 1.0
        for part in normalizer.get("normalizers") or []:
            total *= _growth(part)
        return total
    if normalizer.get("type") == "Replace":
        pattern = normalizer.get("pattern")
        matched = pattern.get("String") if isinstance(pattern, dict) else None
        return max(
            1.0, len(str(normalizer.get("content") or "")) / max(1, len(matched) if isinstance(matched, str) else 1)
        )
    return 4.0 if normalizer.get("type") in ("NFKD", "NFKC", "Precompiled") else 1.0


def _refused(file: str, reason: str) -> InputError:
    return InputError(
        f"The model's {file} cannot be used: {reason}.", "Choose another model, or repair the file if it is yours."
    )
