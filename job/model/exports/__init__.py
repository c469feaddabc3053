"""The merged model in the formats that other programs serve: GGUF for llama.cpp and Ollama, FP8 for vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Largest mean KL divergence from the merged model, in nats per token, and whether greedy answers must be the same
BARS = {"gguf-f16": (0.002, True), "gguf-q8_0": (0.02, False), "gguf-q4_k_m": (1.0, False), "fp8": (0.2, False)}

_GGUF = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3", "yarn")


def obstacle(config: Mapping[str, Any], formats: tuple[str, ...]) -> str | None:
    """Why a model with this config.json cannot be exported to one of these formats. None if it can."""
    if not any(name.startswith("gguf") for name in formats):
        return None
    kinds = config.get("architectures") or ["an unknown architecture"]
    if kinds[0] not in _GGUF:
        return f"GGUF files of {kinds[0]} cannot be written: only of {', '.join(_GGUF)}"
    kind = rope(config).get("rope_type", "default")
    if kind not in _ROPES:
        return f"rope scaling {kind!r} cannot be written to a GGUF file: only {', '.join(_ROPES)}"
    return None


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding, as newer and older config.json files have them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found
