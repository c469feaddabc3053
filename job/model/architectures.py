"""The decoder architectures whose layers the job computes itself: what sets each apart from Llama's (arXiv:2307.09288).

An architecture is one entry of `ARCHITECTURES`. The fused layer, its proof and the planner read it, so a new one needs an
entry here and a line in the tests. A model that nothing here describes is computed by transformers and peft.

This file does not import torch, so that a plan is there immediately and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]  # of config.json
Windows = tuple[int | None, ...]

LARGEST_HEAD = 256  # of PyTorch's attention kernel, which also needs a multiple of 8
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


class NotDescribed(Exception):
    """A model whose layers are not described here. The message completes "… because …"."""


def _no_windows(config: Config) -> Windows:
    return (None,) * int(config["num_hidden_layers"])


def _same_window(config: Config) -> Windows:
    """One window for all layers, unless it is null."""
    window = config.get("sliding_window")
    return (None if window is None else int(window),) * int(config["num_hidden_layers"])


def _later_windows(config: Config) -> Windows:
    """A window in the layers that `layer_types` names, or else from `max_window_layers` on, if windows are on at all."""
    count, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not config.get("use_sliding_window") or window is None:
        return (None,) * count
    first = int(config.get("max_window_layers", 28))
    return _windows_by_type(config, window, lambda layer: layer >= first)


def _alternate_windows(config: Config) -> Windows:
    """A window in all layers but each nth, as `layer_types` or `sliding_window_pattern` say."""
    pattern = int(config["sliding_window_pattern"])
    return _windows_by_type(config, config["sliding_window"], lambda layer: (layer + 1) % pattern != 0)


def _windows_without_positions(config: Config) -> Windows:
    """A window in the layers that `layer_types` names, or else in those without positions, if windows are on at all."""
    count, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not config.get("use_sliding_window") or window is None:
        return (None,) * count
    rotates = _some_layers_rotate(config)
    return _windows_by_type(config, window, lambda layer: not rotates[layer])


def _windows_by_type(config: Config, window: int, otherwise: Callable[[int], bool]) -> Windows:
    count, types = int(config["num_hidden_layers"]), config.get("layer_types")
    has = [kind == "sliding_attention" for kind in types] if types else [otherwise(layer) for layer in range(count)]
    return tuple(int(window) if one else None for one in has)


def _every_layer_rotates(config: Config) -> tuple[bool, ...]:
    return (True,) * int(config["num_hidden_layers"])


def _some_layers_rotate(config: Config) -> tuple[bool, ...]:
    """No positions in each nth layer (NoPE; Yang et al. 2025, arXiv:2501.18795)."""
    named = config.get("no_rope_layers")  # 1 for layers with positions, in spite of the name
    if named:
        return tuple(map(bool, named))
    every = int(config["no_rope_layer_interval"])
    return tuple((layer + 1) % every != 0 for layer in range(int(config["num_hidden_layers"])))


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What distinguishes the decoder layers of one of transformers' model classes from Llama's.

    `name` is config.json's `architectures`, and `layer` the class of its layers. `inputs` and `gates` are the linear
    layers that make queries, keys and values, and gate and up: one each, or all in one. `sandwich` layers norm the results
    of attention and gate too, before they are added. `head_norms` norm each head of queries and keys (Dehghani et al.
    2023, arXiv:2302.05442). With `one_more`, norms multiply by 1 + weight, and round once. `drops` are the dropouts that
    config.json may ask for, which must be 0. `defaults` are the values of keys that config.json may leave out.
    `default_targets` are what FT_LORA_TARGET_MODULES=auto stands for.
    """

    name: str
    layer: str
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gates: tuple[str, ...] = ("gate_proj", "up_proj")
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    sandwich: tuple[str, str] | None = None
    head_norms: bool = False
    one_more: bool = False
    activation: str = "hidden_act"
    drops: tuple[str, ...] = ("attention_dropout",)
    defaults: tuple[tuple[str, Any], ...] = ()
    default_targets: tuple[str, ...] = ("q_proj", "v_proj")
    windows: Callable[[Config], Windows] = _no_windows
    rotates: Callable[[Config], tuple[bool, ...]] = _every_layer_rotates

    @property
    def linear(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer, in the order in which the fused layer multiplies with them."""
        return (*self.inputs, "o_proj", *self.gates, "down_proj")


_GEMMA: dict[str, Any] = {
    "norms": ("input_layernorm", "pre_feedforward_layernorm"),
    "sandwich": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "one_more": True,
    "activation": "hidden_activation",
    "windows": _alternate_windows,
}
_GEMMA_DEFAULTS = (
    ("hidden_activation", "gelu_pytorch_tanh"), ("head_dim", 256), ("tie_word_embeddings", True), ("sliding_window", 4096),
    ("query_pre_attn_scalar", 256),
)  # fmt: skip

ARCHITECTURES = (
    Architecture(name="LlamaForCausalLM", layer="LlamaDecoderLayer"),
    Architecture(name="MistralForCausalLM", layer="MistralDecoderLayer", windows=_same_window,
        defaults=(("sliding_window", 4096),),
    ),
    Architecture(name="Qwen2ForCausalLM", layer="Qwen2DecoderLayer", windows=_later_windows),
    Architecture(
        name="Qwen3ForCausalLM", layer="Qwen3DecoderLayer", head_norms=True, windows=_later_windows,
        defaults=(("head_dim", 128),),
    ),
    Architecture(
        name="Phi3ForCausalLM", layer="Phi3DecoderLayer", inputs=("qkv_proj",), gates=("gate_up_proj",),
        drops=("attention_dropout", "resid_pdrop"), default_targets=("qkv_proj",), windows=_same_window,
        defaults=(("original_max_position_embeddings", 4096),),
    ),
    Architecture(
        name="SmolLM3ForCausalLM", layer="SmolLM3DecoderLayer", windows=_windows_without_positions, rotates=_some_layers_rotate,
        defaults=(("no_rope_layer_interval", 4), ("tie_word_embeddings", True)),
    ),
    Architecture(
        name="Gemma2ForCausalLM", layer="Gemma2DecoderLayer",
        defaults=(
            *_GEMMA_DEFAULTS, ("sliding_window_pattern", 2), ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
        ),
        **_GEMMA,
    ),
    Architecture(
        name="Gemma3ForCausalLM", layer="Gemma3DecoderLayer", head_norms=True,
        defaults=(*_GEMMA_DEFAULTS, ("sliding_window_pattern", 6)),
        **_GEMMA,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One model's decoder: its architecture and the dimensions of its config.json.

    `windows` says per layer how many tokens a token attends to, itself included, or None for all before it. `rotates` says
    per layer whether queries and keys are rotated. `softcap` limits attention's scores, and `head_softcap` the logits, by
    c · tanh(x / c). From rows of `lengths_matter_from` tokens on, the positions' angles depend on a batch's longest row.
    """

    architecture: Architecture
    hidden: int
    intermediate: int
    layers: int
    heads: int
    shared_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    activation: str
    windows: Windows
    rotates: tuple[bool, ...]
    softcap: float | None
    head_softcap: float | None
    lengths_matter_from: int | None = None

    @classmethod
    def of(cls, config: Config) -> Decoder:
        """The decoder that a config.json describes. Raises NotDescribed if the fused layers do not compute it."""
        try:
            architecture = _architecture(config)
            return cls._of(architecture, {**dict(architecture.defaults), **config})
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise NotDescribed(f"they cannot read the model's config.json ({type(error).__name__}: {error})") from error

    @classmethod
    def _of(cls, architecture: Architecture, config: Config) -> Decoder:
        heads = int(config["num_attention_heads"])
        found = cls(
            architecture=architecture,
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            shared_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            activation=str(config.get(architecture.activation, "silu")),
            windows=architecture.windows(config),
            rotates=architecture.rotates(config),
            softcap=config.get("attn_logit_softcapping"),
            head_softcap=config.get("final_logit_softcapping"),
            lengths_matter_from=_lengths_matter_from(config),
        )
        if not found.layers == len(found.windows) == len(found.rotates) > 0:
            raise ValueError(
                f"{found.layers} layers, {len(found.windows)} windows, {len(found.rotates)} kinds of positions"
            )
        for name in architecture.drops:
            if config.get(name):
                raise NotDescribed(f"they do not support the model's {name}={config[name]}")
        if config.get("use_bidirectional_attention"):
            raise NotDescribed("they do not support attention to later tokens (use_bidirectional_attention)")
        if found.activation not in _ACTIVATIONS:
            raise NotDescribed(f"they do not support the model's activation, {found.activation}")
        if has_odd_heads(config):
            raise NotDescribed(
                f"their attention needs heads of a multiple of 8 up to {LARGEST_HEAD} values, and the model's have {found.head_dim}"
            )
        return found

    @property
    def query(self) -> int:
        """The width of a token's queries."""
        return self.heads * self.head_dim

    @property
    def packed(self) -> int:
        """The width of a token's queries, keys and values together."""
        return self.query + 2 * self.shared_heads * self.head_dim


def _architecture(config: Config) -> Architecture:
    names = list(config.get("architectures") or [])
    found = next((one for one in ARCHITECTURES if [one.name] == names), None)
    if found is None:
        raise NotDescribed(f"they do not know the layers of {names[0] if names else 'a model without architectures'}")
    stored = config.get("quantization_config") or {}
    if stored and not (stored.get("quant_method") == "bitsandbytes" and stored.get("load_in_4bit")):
        raise NotDescribed("they read 16-bit weights and bitsandbytes' 4 bits only, and the model has others")
    return found


def has_odd_heads(config: Config) -> bool:
    """Whether PyTorch's attention kernel refuses the size of the heads."""
    try:
        size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return True
    return size % 8 != 0 or size > LARGEST_HEAD


def _lengths_matter_from(config: Config) -> int | None:
    """transformers chooses the factors of longrope, and the base of dynamic NTK, by the longest row of a batch."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parts = [part for part in rope.values() if isinstance(part, Mapping)] or [
        rope
    ]  # one for each kind of layer, or for all
    found = []
    for part in parts:
        kind = part.get("rope_type") or part.get("type")
        if kind == "dynamic":
            found.append(int(config["max_position_embeddings"]) + 1)
        elif kind == "longrope" or (kind in ("su", "yarn") and config.get("architectures") == ["Phi3ForCausalLM"]):
            # older names, which transformers takes for longrope in Phi's files
            original = config.get("original_max_position_embeddings") or part.get("original_max_position_embeddings")
            found.append(int(original or config["max_position_embeddings"]) + 1)
    return min(found, default=None)


def default_targets(config: Config) -> tuple[str, ...] | None:
    """The linear layers that FT_LORA_TARGET_MODULES=auto adapts, or None if that is peft's decision."""
    names = list(config.get("architectures") or [])
    return next((one.default_targets for one in ARCHITECTURES if [one.name] == names), None)
