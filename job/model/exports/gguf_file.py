"""Writes a merged model as a GGUF file (github.com/ggml-org/ggml, docs/gguf.md), tensor by tensor."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, RopeScalingType

from job.errors import InputError
from job.model.exports import rope
from job.model.exports.gguf_vocabulary import Vocabulary
from job.model.safetensors_files import Weights

_ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA, "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2, "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}  # fmt: skip
_FILE_TYPES = {
    GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32, GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16, GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip


_NUMPY: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype(np.float32), GGMLQuantizationType.F16: np.dtype(np.float16),
}  # fmt: skip


def write_gguf(
    folder: Path, file: Path, kind: GGMLQuantizationType, tokenizer: Any, *, begins: bool, go_on: Callable[[], None]
) -> None:
    """Write the model in `folder` with its matrices as `kind`, and its tokenizer with the chat template.

    `begins` says whether a prompt begins with the token for that. Raises InputError if a value does not fit `kind`.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, config)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    Vocabulary.of(folder, config["vocab_size"]).write(writer)
    _add_special_tokens(writer, tokenizer, begins)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    weights = Weights(folder)
    tensors: list[tuple[str, GGMLQuantizationType, tuple[int, ...], Callable[[], np.ndarray[Any, Any]]]] = []
    factors = _rope_factors(config)
    if factors is not None:
        tensors.append(
            ("rope_freqs.weight", GGMLQuantizationType.F32, factors.shape, functools.partial(np.copy, factors))
        )
    for name in weights:
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise InputError(f"FT_EXPORT: GGUF has no place for {name}.", "The merged model is intact.")
        shape = weights.shape(name)
        tensors.append((target, _type_of(kind, shape), shape, _reader(weights, name, config, architecture)))
    for target, type_, shape, _ in tensors:
        stored = gguf.quants.quant_shape_to_byte_shape(shape, type_) if type_ not in _NUMPY else shape
        dtype = _NUMPY.get(type_, np.dtype(np.uint8))
        size = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(target, stored, dtype, size, raw_dtype=None if type_ in _NUMPY else type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for target, type_, _, read in tensors:
        go_on()
        values = read()
        if type_ is GGMLQuantizationType.F16 and not float(np.abs(values).max()) <= 65504:
            raise InputError(f"FT_EXPORT: {target} has values that do not fit float16.", "Leave gguf-f16 out.")
        writer.write_tensor_data(gguf.quants.quantize(values, type_))
    writer.close()


def _type_of(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> GGMLQuantizationType:
    """Vectors stay in float32, and so do rows that are not made of whole blocks."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if len(shape) > 1 and shape[-1] % block == 0 else GGMLQuantizationType.F32


def _reader(
    weights: Weights, name: str, config: Mapping[str, Any], architecture: MODEL_ARCH
) -> Callable[[], np.ndarray[Any, Any]]:
    def read() -> np.ndarray[Any, Any]:
        values = weights[name].to(torch.float32).numpy()
        if architecture is MODEL_ARCH.LLAMA and "_proj." in name:
            heads = config["num_attention_heads"]
            if ".q_proj." in name:
                return interleaved(values, heads)
            if ".k_proj." in name:
                return interleaved(values, config.get("num_key_value_heads") or heads)
        return values

    return read


def interleaved(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head in llama.cpp's order for Llama: it rotates neighbours, and transformers the two halves."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _add_shape(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    longest = config["max_position_embeddings"]
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        longest = min(longest, config["sliding_window"])  # longer texts would be attended to otherwise
    writer.add_context_length(longest)
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    turning = rope(config)
    writer.add_rope_freq_base(turning["rope_theta"])
    if turning["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(turning["rope_type"]))
        writer.add_rope_scaling_factor(turning["factor"])
        if turning.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(turning["original_max_position_embeddings"])


def _rope_factors(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, and a slope between."""
    turning = rope(config)
    if turning["rope_type"] != "llama3":
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = turning["rope_theta"] ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    factor, low, high = turning["factor"], turning["low_freq_factor"], turning["high_freq_factor"]
    turns = turning["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    slope = np.clip((turns - low) / (high - low), 0, 1)
    divisors: np.ndarray[Any, Any] = (1 / ((1 - slope) / factor + slope)).astype(np.float32)
    return divisors


def _add_special_tokens(writer: GGUFWriter, tokenizer: Any, begins: bool) -> None:
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):  # fmt: skip
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(number)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
