"""Llama's decoder layer with LoRA as one autograd operation (Touvron et al. 2023, arXiv:2307.09288).

PyTorch's autograd would keep every intermediate result and pass over memory once for each small operation. Here the
backward pass is written out: of a layer that is *kept*, it needs six tensors as wide as the model and the two halves of
the gate; of one that is *recomputed*, its input alone, and of the forward pass it repeats what it needs, which the last
product is not. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from job.model.fused import pointwise
from job.model.fused.attention import Attended, Rows, attend
from job.model.fused.products import Draw, Products, base_of
from job.model.fused.rounding import Rounded
from job.model.quantization import make_resident

Weights = Literal["4-bit", "resident", "fp8"]

_ATTENTION_INPUTS, _ATTENTION_OUTPUT = slice(0, 3), slice(3, 4)
_GATES, _DOWN = slice(4, 6), slice(6, 7)
LINEAR_LAYERS = 7


@dataclass
class _Kept:
    """What the backward pass of one layer needs."""

    narrow_inputs: torch.Tensor | None
    attended: Attended
    narrow_output: torch.Tensor | None
    middle: torch.Tensor
    gate_up_whole: torch.Tensor
    gate_up: torch.Tensor
    narrow_gates: torch.Tensor | None
    narrow_down: torch.Tensor | None = None


class FusedLayer:
    """Computes what `layer` computes. `kept` may be changed between steps; the numbers stay the same. `dropout_seed` is
    the first of the `LINEAR_LAYERS` that it uses, `first_token` the place in the batch of what it is given next."""

    def __init__(self, layer: LlamaDecoderLayer, weights: Weights) -> None:
        attention, gate = layer.self_attn, layer.mlp
        if weights != "4-bit":
            make_resident(layer)
        options = {"eight_bit": weights == "fp8"}
        self.kept, self.dropout_seed, self.first_token = True, 0, 0
        self._dim, self._scaling = attention.head_dim, attention.scaling
        self._heads = attention.config.num_attention_heads
        self._shared_heads = attention.config.num_key_value_heads
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self.inputs = Products([attention.q_proj, attention.k_proj, attention.v_proj], **options)
        self.output = Products([attention.o_proj], **options)
        self.gates = Products([gate.gate_proj, gate.up_proj], **options)
        self._gate_width = 2 * attention.config.intermediate_size
        self.down = Products([gate.down_proj], **options)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cu_seq_lens_q: torch.Tensor,
        max_length_q: int,
        **_: Any,
    ) -> torch.Tensor:
        """Takes the place of the layer's `forward`: (1, tokens, width) → the same."""
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        rows = Rows(cos, sin, cu_seq_lens_q, int(max_length_q))
        trained = [p for products in self._products() for p in products.parameters]
        seeds = [(self.dropout_seed + place, self.first_token) for place in range(LINEAR_LAYERS)]
        out: torch.Tensor = _Layer.apply(hidden_states[0], self, rows, seeds, *trained)  # type: ignore[no-untyped-call]
        return out.unsqueeze(0)

    def _products(self) -> tuple[Products, ...]:
        return self.inputs, self.output, self.gates, self.down

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]) -> tuple[torch.Tensor, _Kept]:
        kept = self._middle(x, rows, seeds)
        rounded = self.down.rounded_input(x)
        act = pointwise.gated(kept.gate_up, self.down.new_input(x), rounded)
        y, kept.narrow_down = self.down.forward(act, seeds[_DOWN], rounded=rounded)
        return y.add_(kept.middle), kept

    def _middle(self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]) -> _Kept:
        """The layer without its last product, whose result no gradient needs."""
        rounded = self.inputs.rounded_input(x)
        normed = self._norm(0, x, self.inputs, rounded)
        packed, narrow_inputs = self.inputs.forward(normed, seeds[_ATTENTION_INPUTS], rounded=rounded)
        rotated = packed[:, : (self._heads + self._shared_heads) * self._dim].unflatten(1, (-1, self._dim))  # type: ignore[no-untyped-call]
        pointwise.rotate(rotated, rows.cos, rows.sin, out=rotated)
        query, key, value = self._split_heads(packed)
        flat = self.output.new_input(x)
        attended = attend(query, key, value, rows, self._scaling, flat)
        middle, narrow_output = self.output.forward(flat, seeds[_ATTENTION_OUTPUT])
        middle += x
        rounded = self.gates.rounded_input(x)
        normed = self._norm(1, middle, self.gates, rounded)
        whole, narrow_gates = self.gates.forward(normed, seeds[_GATES], room=True, rounded=rounded)
        gate_up = whole[:, : self._gate_width]
        return _Kept(narrow_inputs, attended, narrow_output, middle, whole, gate_up, narrow_gates)

    def _norm(self, which: int, x: torch.Tensor, then: Products, rounded: Rounded | None = None) -> torch.Tensor:
        norm = self._norms[which]
        return pointwise.rms_norm(x, norm.weight, norm.variance_epsilon, then.new_input(x), rounded)

    def _split_heads(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counts = [self._heads, self._shared_heads, self._shared_heads]
        parts = torch.split(packed, [count * self._dim for count in counts], dim=1)
        return tuple(torch.unflatten(part, 1, (-1, self._dim)) for part in parts)

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward(
        self, of_out: torch.Tensor, x: torch.Tensor, seeds: Sequence[Draw], kept: _Kept, *, of_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The gradients of x, unless nobody wants it, and of what is trained, in the order of `_products`."""
        (of_middle, rounded), of_gates, of_down = self._gate_backward(of_out, seeds, kept)
        del kept.gate_up, kept.gate_up_whole, kept.middle
        packed, of_output = self._attention_backward(of_middle, rounded, seeds, kept)
        of_normed, of_narrow = self.inputs.input_gradient(packed, seeds[_ATTENTION_INPUTS], wanted=of_x)
        of_inputs = self.inputs.parameter_gradients(
            packed, of_narrow, self._norm(0, x, self.inputs), kept.narrow_inputs, seeds[_ATTENTION_INPUTS]
        )
        gradient = self._norm_backward(0, of_normed, x, of_middle, torch.empty_like(x)) if of_x else None
        return gradient, [*of_inputs, *of_output, *of_gates, *of_down]

    def _gate_backward(
        self, of_out: torch.Tensor, seeds: Sequence[Draw], kept: _Kept
    ) -> tuple[tuple[torch.Tensor, Rounded | None], list[torch.Tensor], list[torch.Tensor]]:
        """The gradients of what lies between attention and gate, with room for `output`'s border, and of what is trained."""
        of_down_out = _first_columns(self.down.new_output(of_out), of_out)
        of_act, of_narrow = self.down.input_gradient(of_down_out, seeds[_DOWN])
        rounded = self.gates.rounded_output(of_out)
        act = pointwise.gated_backward_(of_act, kept.gate_up, rounded)  # from here on gate_up is its gradient
        narrow = self.down.narrow(act, seeds[_DOWN]) if kept.narrow_down is None else kept.narrow_down
        of_down = self.down.parameter_gradients(of_out, of_narrow, act, narrow, seeds[_DOWN])
        del act, of_act, of_down_out
        of_normed, of_narrow = self.gates.input_gradient(kept.gate_up_whole, seeds[_GATES], rounded=rounded)
        del rounded
        of_gates = self.gates.parameter_gradients(
            kept.gate_up, of_narrow, self._norm(1, kept.middle, self.gates), kept.narrow_gates, seeds[_GATES]
        )
        rounded = self.output.rounded_output(of_out)
        of_middle = self._norm_backward(1, of_normed, kept.middle, of_out, self.output.new_output(of_out), rounded)
        return (of_middle, rounded), of_gates, of_down

    def _attention_backward(
        self, of_middle: torch.Tensor, rounded: Rounded | None, seeds: Sequence[Draw], kept: _Kept
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of the heads before they were rotated, with room for `inputs`' border, and of what is trained."""
        of_attended, of_narrow = self.output.input_gradient(of_middle, seeds[_ATTENTION_OUTPUT], rounded=rounded)
        of_output = self.output.parameter_gradients(
            of_middle, of_narrow, kept.attended.out, kept.narrow_output, seeds[_ATTENTION_OUTPUT]
        )
        packed = self.inputs.new_output(of_attended)
        kept.attended.gradients_into(of_attended, packed)
        return packed, of_output

    def _norm_backward(
        self,
        which: int,
        gradient: torch.Tensor,
        x: torch.Tensor,
        residual: torch.Tensor,
        out: torch.Tensor,
        rounded: Rounded | None = None,
    ) -> torch.Tensor:
        norm = self._norms[which]
        return pointwise.rms_norm_backward(gradient, x, norm.weight, norm.variance_epsilon, residual, out, rounded)


def _first_columns(of: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, in the first columns of a wider tensor, unless it is no wider."""
    if of.shape == values.shape:
        return values
    pointwise.place(values, of[:, : values.shape[1]])
    return of


class _Layer(torch.autograd.Function):
    """Autograd's view of a `FusedLayer`: from its input and its adapters' weights to its output."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FusedLayer, rows: Rows, seeds: Sequence[Draw], *trained: torch.Tensor
    ) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out, kept = layer.forward(x, rows, seeds)
        ctx.layer, ctx.rows, ctx.seeds = layer, rows, seeds
        ctx.save_for_backward(x)
        # not by save_for_backward, which takes tensors alone
        ctx.kept = kept if layer.kept and any(ctx.needs_input_grad) else None
        return out

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # the graph outlives this call, and its memory need not
        with torch.autocast(x.device.type, enabled=False):
            if kept is None:
                kept = ctx.layer._middle(x, ctx.rows, ctx.seeds)
            of_x, of_trained = ctx.layer.backward(
                of_outputs[0].contiguous(), x, ctx.seeds, kept, of_x=ctx.needs_input_grad[0]
            )
        return of_x, None, None, None, *of_trained


def can_fuse(model: PeftModel) -> bool:
    """Whether every decoder layer is Llama's, without biases, and its linear layers are plain ones or all 4-bit."""
    layers = getattr(model.get_base_model().base_model, "layers", [])
    config = model.get_base_model().config
    return (
        bool(layers)
        and all(type(layer) is LlamaDecoderLayer and _has_known_weights(layer) for layer in layers)
        and config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and not config.attention_dropout
    )


def _has_known_weights(layer: LlamaDecoderLayer) -> bool:
    attention, gate = layer.self_attn, layer.mlp
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    bases = [base_of(part) for part in (*linear, gate.gate_proj, gate.up_proj, gate.down_proj)]
    plain = all(type(base) is torch.nn.Linear and base.weight.is_floating_point() for base in bases)
    return plain or all(isinstance(base, bnb.nn.Linear4bit) for base in bases)


def fuse_layers(model: PeftModel, weights: Weights) -> list[FusedLayer]:
    """Let each decoder layer of a model that `can_fuse` be computed by its fused form; returns them, first to last."""
    fused = []
    for layer in model.get_base_model().base_model.layers:
        one = FusedLayer(layer, weights)
        layer.forward = one
        fused.append(one)
    return fused
