"""Small models of each described architecture with random weights, for tests and for benchmarks on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.shapes import SHAPES
from job.model.architectures import Decoder
from job.model.fused.layer import FusedLayer, Weights, can_fuse, fuse_layer
from job.model.fused.workspace import Workspace
from job.model.patches import Patches

_SMALL = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model of `kind` (transformers' model_type) with `changes` to the small config."""

    name: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, **changes: Any) -> Any:
        return AutoConfig.for_model(self.kind, **{**_SMALL, **self.changes, **changes})


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


FAMILIES = (
    Family("llama", "llama"),
    Family("llama, every head apart", "llama", {"num_key_value_heads": 4}),
    Family("llama, 8 query heads share one", "llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32}),
    Family("llama, heads of 256", "llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}),
    Family("llama, biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("llama, linear positions", "llama", _rope("linear", factor=4.0)),
    Family(
        "llama 3", "llama",
        _rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ) | {"tie_word_embeddings": True},
    ),
    Family("llama, yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    Family("mistral", "mistral", {"sliding_window": None}),
    Family("mistral, window shorter than rows", "mistral", {"sliding_window": 5}),
    Family("mistral, window longer than rows", "mistral", {"sliding_window": 100}),
    Family("mistral nemo", "mistral", {"sliding_window": None, "head_dim": 32}),
    Family("qwen 2", "qwen2"),
    Family(
        "qwen 2, windows in later layers", "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    Family("qwen 3", "qwen3", {"head_dim": 32}),
    Family("qwen 3, biases", "qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    Family("phi 3", "phi3", {"sliding_window": 7}),
    Family(
        "phi 4 mini", "phi3",
        {"head_dim": 32, **_rope("default", partial_rotary_factor=0.75), "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    Family("smollm 3", "smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    Family("gemma 2", "gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 20}),
    Family("gemma 3", "gemma3_text", {"sliding_window": 6, "num_hidden_layers": 6, "query_pre_attn_scalar": 20}),
)  # fmt: skip


def base_model(config: Any, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """The model with random weights, norms and biases that are all of use."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            elif parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[1] ** 0.25)
    model.requires_grad_(False)
    return model.to(dtype)


def as_json(config: Any) -> dict[str, Any]:
    """What config.json would say."""
    return {**config.to_dict(), "architectures": [AutoModelForCausalLM._model_mapping[type(config)].__name__]}


def decoder_of(config: Any) -> Decoder:
    """The description that config.json would give."""
    return Decoder.of(as_json(config))


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of one of the benchmark's shapes."""
    kind, sizes = SHAPES[shape]
    return as_json(AutoConfig.for_model(kind, **{"pad_token_id": 0, **sizes}))


def adapted(model: Any, rank: int = 8, targets: tuple[str, ...] | None = None, dropout: float = 0.0) -> PeftModel:
    """With adapters on all linear layers of the decoder, whose matrices are both nonzero."""
    wanted = targets or decoder_of(model.config).architecture.linear
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(wanted), task_type="CAUSAL_LM"
    )
    found = get_peft_model(model, adapter)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise * (0.05 if "lora_B" in name else 0.3)).float().to(parameter.device)
    return found.train()


def fuse(model: PeftModel, weights: Weights, patches: Patches | None = None) -> list[FusedLayer]:
    """Fuse all layers of a model that is described."""
    decoder, patches = decoder_of(model.get_base_model().config), patches or Patches()
    assert can_fuse(model, decoder, weights)
    workspace = Workspace(patches)
    return [fuse_layer(model, index, decoder, weights, workspace, patches) for index in range(decoder.layers)]
