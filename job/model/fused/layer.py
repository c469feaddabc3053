"""Llama's decoder layer with LoRA as one autograd operation (Touvron et al. 2023, arXiv:2307.09288).

PyTorch's autograd would keep every intermediate result and pass over memory once per small operation. Here the backward
pass is written by hand. For a *kept* layer it needs six tensors as wide as the model and both halves of the gate. For a
*recomputed* layer it needs the input and the last adapter's narrow product. It then repeats the forward pass except for
the last product, whose result no gradient needs. Both give the same numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from job.model.fused import pointwise
from job.model.fused.attention import Attended, Rows, attend
from job.model.fused.products import Draw, Normed, Products, base_of
from job.model.fused.rounding import Rounded
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from job.model.quantization import make_resident

Weights = Literal["4-bit", "resident", "fp8"]

_ATTENTION_INPUTS, _ATTENTION_OUTPUT = slice(0, 3), slice(3, 4)
_GATES, _DOWN = slice(4, 6), slice(6, 7)
LINEAR_LAYERS = 7


@dataclass
class _Kept:
    """What the backward pass of one layer needs. `gate_up_whole` is `gate_up` with its border."""

    first_normed: Normed
    narrow_inputs: torch.Tensor | None
    attended: Attended
    narrow_output: torch.Tensor | None
    second_normed: Normed
    gate_up_whole: torch.Tensor
    gate_up: torch.Tensor
    narrow_gates: torch.Tensor | None


class FusedLayer:
    """Computes what `layer` computes, forward and backward.

    `kept` says whether the layer is kept or recomputed. It may change between steps, and the numbers stay the same.
    `dropout_seed` is the first of the `LINEAR_LAYERS` consecutive seeds that the layer uses. `first_token` is the place
    in the batch of the tokens that come next.
    """

    def __init__(self, layer: LlamaDecoderLayer, weights: Weights, workspace: Workspace, patches: Patches) -> None:
        attention, gate = layer.self_attn, layer.mlp
        if weights != "4-bit":
            make_resident(layer, patches)
        products = functools.partial(Products, workspace=workspace, patches=patches, eight_bit=weights == "fp8")
        self.kept, self.dropout_seed, self.first_token = True, 0, 0
        self._workspace = workspace
        self._dim, self._scaling = attention.head_dim, attention.scaling
        self._heads = attention.config.num_attention_heads
        self._shared_heads = attention.config.num_key_value_heads
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self.inputs = products([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = products([attention.o_proj])
        self.gates = products([gate.gate_proj, gate.up_proj])
        self._gate_width = 2 * attention.config.intermediate_size
        self.down = products([gate.down_proj])
        self._trained = [p for products in self._products() for p in products.parameters]

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cu_seq_lens_q: torch.Tensor,
        max_length_q: int,
        **_: Any,
    ) -> torch.Tensor:
        """Replaces the layer's `forward`: (1, tokens, width) → (1, tokens, width)."""
        cos, sin = (part[0].contiguous() for part in position_embeddings)
        rows = Rows(cos, sin, cu_seq_lens_q, int(max_length_q))
        seeds = [(self.dropout_seed + place, self.first_token) for place in range(LINEAR_LAYERS)]
        out: torch.Tensor = _Layer.apply(hidden_states.squeeze(0), self, rows, seeds, *self._trained)  # type: ignore[no-untyped-call]
        return out.unsqueeze(0)

    def _products(self) -> tuple[Products, ...]:
        return self.inputs, self.output, self.gates, self.down

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]
    ) -> tuple[torch.Tensor, _Kept, torch.Tensor | None]:
        """The result, what the backward pass needs, and `down`'s narrow product, which recomputed layers keep too."""
        self._workspace.forget_gradient()
        kept = self.middle(x, rows, seeds)
        y, narrow_down = self.down.forward_gated(kept.gate_up, seeds[_DOWN])
        return y.add_(kept.second_normed.x), kept, narrow_down

    def middle(self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]) -> _Kept:
        """The forward pass up to the last product, whose result no gradient needs."""
        rounded = self.inputs.rounded_input(x)
        normed, first = self._norm_(0, x, self.inputs, rounded)
        packed, narrow_inputs = self.inputs.forward_(normed, seeds[_ATTENTION_INPUTS], rounded=rounded)
        rotated = torch.unflatten(packed[:, : (self._heads + self._shared_heads) * self._dim], 1, (-1, self._dim))
        pointwise.rotate(rotated, rows.cos, rows.sin, out=rotated)
        query, key, value = self._split_heads(packed)
        flat = self.output.new_input(x)
        attended = attend(query, key, value, rows, self._scaling, self.output.inner(flat))
        middle, narrow_output = self.output.forward_(flat, seeds[_ATTENTION_OUTPUT])
        rounded = self.gates.rounded_input(x)
        normed, second = self._norm_(1, middle, self.gates, rounded, add=x)
        whole, narrow_gates = self.gates.forward_(normed, seeds[_GATES], room=True, rounded=rounded)
        gate_up = whole[:, : self._gate_width]
        return _Kept(first, narrow_inputs, attended, narrow_output, second, whole, gate_up, narrow_gates)

    def _norm_(
        self, which: int, x_: torch.Tensor, then: Products, rounded: Rounded | None, add: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Normed]:
        norm, out = self._norms[which], then.new_input(x_)
        inverse = pointwise.rms_norm_(x_, norm.weight, norm.variance_epsilon, then.inner(out), rounded, add)
        return out, Normed(x_, inverse, norm.weight, norm.variance_epsilon)

    def _split_heads(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counts = [self._heads, self._shared_heads, self._shared_heads]
        parts = packed.split_with_sizes([count * self._dim for count in counts], 1)
        return tuple(torch.unflatten(part, 1, (-1, self._dim)) for part in parts)

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward_(
        self,
        of_out: torch.Tensor,
        seeds: Sequence[Draw],
        kept_: _Kept,
        narrow_down: torch.Tensor | None,
        *,
        of_x: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The gradients of x, if `of_x` asks for it, and of the trained parameters in the order of `_products`.

        `kept_` cannot be used again: its gate is overwritten by a gradient, and parts of it are freed early.
        """
        (of_middle, rounded), of_gates, of_down = self._gate_backward_(of_out, seeds, kept_, narrow_down)
        del kept_.gate_up, kept_.gate_up_whole, kept_.second_normed
        packed, of_output = self._attention_backward_(of_middle, rounded, seeds, kept_)
        of_normed, of_narrow = self.inputs.input_gradient_(packed, seeds[_ATTENTION_INPUTS], wanted=of_x)
        of_inputs = self.inputs.in_order(
            self.inputs.of_a(of_narrow, kept_.first_normed, seeds[_ATTENTION_INPUTS]),
            self.inputs.of_b(packed, kept_.narrow_inputs),
        )
        gradient = None
        if of_x:  # with room for the border of the layer before this one
            wide = self.down.new_output(of_normed)
            gradient = self._norm_backward(of_normed, kept_.first_normed, of_middle, wide)[:, : of_normed.shape[1]]
            self._workspace.leave_gradient(wide)
        return gradient, [*of_inputs, *of_output, *of_gates, *of_down]

    def _gate_backward_(
        self, of_out: torch.Tensor, seeds: Sequence[Draw], kept_: _Kept, narrow_down: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, Rounded | None], list[torch.Tensor], list[torch.Tensor]]:
        """The gradients of the states between attention and gate, with `output`'s border, and of the adapters."""
        of_down_out = self._with_border(of_out)
        of_act, of_narrow = self.down.input_gradient_(of_down_out, seeds[_DOWN])
        rounded = self.gates.rounded_output(of_out)
        of_down_a, of_gates_b = self._gated_backward_(of_act, of_narrow, rounded, seeds, kept_)
        of_down = self.down.in_order(of_down_a, self.down.of_b(of_out, narrow_down))
        del of_act, of_down_out
        of_normed, of_narrow = self.gates.input_gradient_(kept_.gate_up_whole, seeds[_GATES], rounded=rounded)
        del rounded
        of_gates = self.gates.in_order(self.gates.of_a(of_narrow, kept_.second_normed, seeds[_GATES]), of_gates_b)
        rounded = self.output.rounded_output(of_out)
        room = self.output.new_output(of_out)
        of_middle = self._norm_backward(of_normed, kept_.second_normed, of_out, room, rounded)
        return (of_middle, rounded), of_gates, of_down

    def _gated_backward_(
        self,
        of_act: torch.Tensor,
        of_narrow: torch.Tensor | None,
        rounded: Rounded | None,
        seeds: Sequence[Draw],
        kept_: _Kept,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Overwrite `gate_up` with its gradient. Returns those of `down`'s A and `gates`' B, which need the gate."""
        if rounded is not None or self.down.drops:
            act = pointwise.gated_backward_(of_act, kept_.gate_up, rounded)
            return self.down.of_a(of_narrow, act, seeds[_DOWN]), self.gates.of_b(kept_.gate_up, kept_.narrow_gates)
        parts: list[torch.Tensor | None] = [None, None]
        scales = [1.0, 1.0]
        for adapter in self.gates.adapters:
            assert kept_.narrow_gates is not None
            parts[adapter.seed], scales[adapter.seed] = kept_.narrow_gates[:, adapter.ranks], adapter.scale
        beside = pointwise.Beside(of_narrow, parts[0], parts[1], (scales[0], scales[1]))
        of_a, *of_b = pointwise.gated_backward_adapted_(of_act, kept_.gate_up, beside)
        return [] if of_a is None else [of_a], [part for part in of_b if part is not None]

    def _attention_backward_(
        self, of_middle_: torch.Tensor, rounded: Rounded | None, seeds: Sequence[Draw], kept: _Kept
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of the unrotated heads, with room for `inputs`' border, and of the adapter."""
        of_attended, of_narrow = self.output.input_gradient_(of_middle_, seeds[_ATTENTION_OUTPUT], rounded=rounded)
        of_output = self.output.in_order(
            self.output.of_a(of_narrow, kept.attended.out, seeds[_ATTENTION_OUTPUT]),
            self.output.of_b(of_middle_, kept.narrow_output),
        )
        packed = self.inputs.new_output(of_attended)
        kept.attended.gradients_into_(of_attended, packed)
        return packed, of_output

    def _with_border(self, of_y: torch.Tensor) -> torch.Tensor:
        """The gradient of the layer's output with `down`'s border: the wider tensor around it, or else a copy."""
        wide = self._workspace.take_gradient(of_y, self.down.border)
        if wide is not None:
            return wide
        if not self.down.border:
            return of_y
        wide = self.down.new_output(of_y)
        pointwise.place(of_y, wide[:, : of_y.shape[1]])
        return wide

    @staticmethod
    def _norm_backward(
        gradient: torch.Tensor, of: Normed, residual: torch.Tensor, out: torch.Tensor, rounded: Rounded | None = None
    ) -> torch.Tensor:
        return pointwise.rms_norm_backward(gradient, of.x, of.weight, of.epsilon, residual, out, rounded)


class _Layer(torch.autograd.Function):
    """Autograd's view of a `FusedLayer`: a function of its input and its adapters' weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FusedLayer, rows: Rows, seeds: Sequence[Draw], *trained: torch.Tensor
    ) -> torch.Tensor:
        with _without_autocast(x.device.type):
            out, kept, narrow_down = layer.forward(x, rows, seeds)
        ctx.layer, ctx.rows, ctx.seeds = layer, rows, seeds
        ctx.save_for_backward(x)
        # not by save_for_backward, which only takes tensors
        ctx.kept, ctx.narrow_down = None, None
        if any(ctx.needs_input_grad):
            ctx.kept, ctx.narrow_down = kept if layer.kept else None, narrow_down
        return out

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), of_out = ctx.saved_tensors, of_outputs[0]
        kept, ctx.kept = ctx.kept, None  # the graph outlives this call, but this memory should not
        with _without_autocast(x.device.type):
            if kept is None:
                kept = ctx.layer.middle(x, ctx.rows, ctx.seeds)
            of_x, of_trained = ctx.layer.backward_(
                of_out if of_out.stride(1) == 1 else of_out.contiguous(),
                ctx.seeds, kept, ctx.narrow_down, of_x=ctx.needs_input_grad[0],
            )  # fmt: skip
        return of_x, None, None, None, *of_trained


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off if it is on: all types are right already. Entering it costs the host more than a launch."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def can_fuse(model: PeftModel) -> bool:
    """Whether all decoder layers are Llama's without biases, with linear layers that are all plain or all 4-bit."""
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


def fuse_layers(model: PeftModel, weights: Weights, patches: Patches) -> Iterator[FusedLayer]:
    """Replace each decoder layer's forward pass by a fused one, one layer per iteration. Check `can_fuse` first."""
    workspace = Workspace(patches)
    for layer in model.get_base_model().base_model.layers:
        fused = FusedLayer(layer, weights, workspace, patches)
        patches.replace(layer, "forward", fused)
        yield fused
