"""The shapes of published models, for models with random weights."""

from __future__ import annotations

from typing import Any

_LLAMA_3 = {
    "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip

# transformers' model type, and the sizes of config.json
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": ("llama", {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
    "llama-3-8b": ("llama", {**_LLAMA_3, "intermediate_size": 14_336}),
    "llama-3.2-1b": (
        "llama",
        {
            **_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "head_dim": 64, "tie_word_embeddings": True,
        },
    ),
    "mistral-7b": ("mistral", {"vocab_size": 32_000, "intermediate_size": 14_336, "sliding_window": 4096}),
    "qwen2.5-7b": (
        "qwen2",
        {
            "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
    "phi-4-mini": (
        "phi3",
        {
            "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True, "resid_pdrop": 0.0,
            "sliding_window": None, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75},
        },
    ),
    "smollm3-3b": (
        "smollm3",
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 4,
        },
    ),
    "gemma-2-2b": (
        "gemma2",
        {
            "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        },
    ),
    "gemma-3-4b": (
        "gemma3_text",
        {
            "vocab_size": 262_208, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
            "query_pre_attn_scalar": 256,
        },
    ),
    "gemma-3-12b": (
        "gemma3_text",
        {
            "vocab_size": 262_208, "hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
            "query_pre_attn_scalar": 256,
        },
    ),
}  # fmt: skip
