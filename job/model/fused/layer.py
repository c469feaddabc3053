"""A decoder layer with LoRA as one autograd operation, for the architectures that `model/architectures.py` describes.

PyTorch's autograd would keep every intermediate result and pass over memory once per small operation. Here the backward
pass is written by hand. For a *kept* layer it needs six tensors as wide as the model and both halves of the gate. For a
*recomputed* layer it needs the input and the last adapter's narrow product. It then repeats the forward pass except for
the last product, whose result no gradient needs. Both give the same numbers. A layer whose results are normed before
they are added (Gemma's) also keeps those results.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import PeftModel

from job.model.architectures import Decoder
from job.model.fused import pointwise
from job.model.fused.attention import Attended, Rows, Scores, attend
from job.model.fused.products import Draw, Normed, Products, base_of
from job.model.fused.rounding import Rounded
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from job.model.quantization import make_resident

Weights = Literal["4-bit", "resident", "fp8"]

_ATTENTION_INPUTS, _ATTENTION_OUTPUT = slice(0, 3), slice(3, 4)
_GATES, _DOWN = slice(4, 6), slice(6, 7)
_PLACES = (_ATTENTION_INPUTS, _ATTENTION_OUTPUT, _GATES, _DOWN)
LINEAR_LAYERS = 7


@dataclass
class _Kept:
    """What the backward pass of one layer needs. `gate_up_whole` is `gate_up` with its border.

    `heads` are queries and keys before their norm, and `attention` is the result of attention before its own norm, if the
    architecture has these norms.
    """

    first_normed: Normed
    narrow_inputs: torch.Tensor | None
    heads: torch.Tensor | None
    attention: Normed | None
    attended: Attended
    narrow_output: torch.Tensor | None
    second_normed: Normed
    gate_up_whole: torch.Tensor
    gate_up: torch.Tensor
    narrow_gates: torch.Tensor | None


@dataclass(frozen=True)
class _Behind:
    """What recomputed layers keep of the last product: `narrow`, and its result if that is normed before it is added."""

    narrow: torch.Tensor | None
    normed: Normed | None


@dataclass(frozen=True)
class Norm:
    """A norm's weight, as it is multiplied with, and its epsilon. Float32 weights are multiplied before rounding."""

    weight: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: torch.nn.Module, decoder: Decoder) -> Norm:
        weight: Any = norm.weight
        epsilon: Any = norm.eps if decoder.architecture.one_more else norm.variance_epsilon
        return cls(1 + weight.data.float() if decoder.architecture.one_more else weight, epsilon)


class FusedLayer:
    """Computes what the model's layer number `index` computes, forward and backward.

    `kept` says whether the layer is kept or recomputed. It may change between steps, and the numbers stay the same.
    `dropout_seed` is the first of the `LINEAR_LAYERS` consecutive seeds that the layer uses. `first_token` is the place
    in the batch of the tokens that come next. A `moment` is added to both (see `pointwise.dropout_`). `scores` is how
    attention computes its scores.
    """

    def __init__(
        self, layer: Any, index: int, decoder: Decoder, weights: Weights, workspace: Workspace, patches: Patches
    ) -> None:
        attention, gate, architecture = layer.self_attn, layer.mlp, decoder.architecture
        if weights != "4-bit":
            make_resident(layer, patches)
        products = functools.partial(Products, workspace=workspace, patches=patches, eight_bit=weights == "fp8")
        self.kept, self.dropout_seed, self.first_token = True, 0, 0
        self.moment: torch.Tensor | None = None
        self._workspace = workspace
        self._dim, self._heads, self._shared_heads = decoder.head_dim, decoder.heads, decoder.shared_heads
        self.scores = Scores(float(attention.scaling), decoder.windows[index], decoder.softcap)
        self._rotates, self._gelu = decoder.rotates[index], decoder.activation != "silu"
        self._norms = [Norm.of(getattr(layer, name), decoder) for name in architecture.norms]
        self._result_norms = [Norm.of(getattr(layer, name), decoder) for name in architecture.sandwich or ()]
        self._head_norm = _head_norm(attention, decoder) if architecture.head_norms else None
        self.inputs = products([getattr(attention, name) for name in architecture.inputs])
        self.output = products([attention.o_proj])
        self.gates = products([getattr(gate, name) for name in architecture.gates])
        self._gate_width, self._gates_apart = 2 * decoder.intermediate, len(architecture.gates) == 2
        self.down = products([gate.down_proj])
        self._names = (
            [f"self_attn.{name}" for name in architecture.inputs], ["self_attn.o_proj"],
            [f"mlp.{name}" for name in architecture.gates], ["mlp.down_proj"],
        )  # fmt: skip
        self.trained = [parameter for products in self._products() for parameter in products.parameters]
        self._leaves: Sequence[torch.Tensor] = self.trained

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
        cos, sin = (part[0].contiguous() for part in position_embeddings) if self._rotates else (None, None)
        rows = Rows(cos, sin, cu_seq_lens_q, int(max_length_q))
        seeds = [Draw(self.dropout_seed + place, self.first_token, self.moment) for place in range(LINEAR_LAYERS)]
        out: torch.Tensor = _Layer.apply(hidden_states.squeeze(0), self, rows, seeds, *self._leaves)  # type: ignore[no-untyped-call]
        return out.unsqueeze(0)

    def _products(self) -> tuple[Products, ...]:
        return self.inputs, self.output, self.gates, self.down

    def train_through(self, leaves: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        """From now on, pass gradients to other leaves of autograd's graph than the parameters, with the same values."""
        self._leaves = [leaves[parameter] for parameter in self.trained]

    def dropout_masks(self, tokens: int) -> dict[str, tuple[float, torch.Tensor]]:
        """What dropout makes of ones, as it is drawn for the next tokens, with its probability.

        They are (tokens, inputs) each, by the names of the linear layers within the decoder layer.
        """
        found = {}
        for products, places, names in zip(self._products(), _PLACES, self._names, strict=True):
            for adapter in products.adapters:
                if adapter.dropout:
                    ones = torch.ones(tokens, adapter.a.shape[1], device=adapter.a.device)
                    seed = self.dropout_seed + places.start + adapter.seed
                    mask = pointwise.dropout_(ones, adapter.dropout, seed, self.first_token, self.moment)
                    found[names[adapter.seed]] = adapter.dropout, mask
        return found

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]) -> tuple[torch.Tensor, _Kept, _Behind]:
        """The result, what the backward pass needs, and what it needs of recomputed layers too."""
        self._workspace.forget_gradient()
        kept = self.middle(x, rows, seeds)
        y, narrow_down = self.down.forward_gated(kept.gate_up, seeds[_DOWN], gelu=self._gelu)
        middle = kept.second_normed.x
        if not self._result_norms:
            return y.add_(middle), kept, _Behind(narrow_down, None)
        out, normed = self._normed_result(1, y)
        return out.add_(middle), kept, _Behind(narrow_down, normed)

    def middle(self, x: torch.Tensor, rows: Rows, seeds: Sequence[Draw]) -> _Kept:
        """The forward pass up to the last product, whose result no gradient needs."""
        rounded = self.inputs.rounded_input(x)
        normed, first = self._norm_(0, x, self.inputs, rounded)
        packed, narrow_inputs = self.inputs.forward_(normed, seeds[_ATTENTION_INPUTS], rounded=rounded)
        rotated, heads = self._queries_and_keys(packed), None
        if self._head_norm is not None:
            heads = torch.empty(rotated.shape, device=x.device, dtype=x.dtype)
            pointwise.norm_heads_(rotated, self._head_norm.weight, self._head_norm.epsilon, heads)
        if rows.cos is not None and rows.sin is not None:
            pointwise.rotate(rotated, rows.cos, rows.sin, out=rotated)
        query, key, value = self._split_heads(packed)
        flat = self.output.new_input(x)
        attended = attend(query, key, value, rows, self.scores, self.output.inner(flat))
        middle, narrow_output = self.output.forward_(flat, seeds[_ATTENTION_OUTPUT])
        attention = None
        if self._result_norms:
            middle, attention = self._normed_result(0, middle)
        rounded = self.gates.rounded_input(x)
        normed, second = self._norm_(1, middle, self.gates, rounded, add=x)
        whole, narrow_gates = self.gates.forward_(normed, seeds[_GATES], room=True, rounded=rounded)
        gate_up = whole[:, : self._gate_width]
        return _Kept(
            first, narrow_inputs, heads, attention, attended, narrow_output, second, whole, gate_up, narrow_gates
        )

    def _norm_(
        self, which: int, x_: torch.Tensor, then: Products, rounded: Rounded | None, add: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Normed]:
        norm, out = self._norms[which], then.new_input(x_)
        inverse = pointwise.rms_norm_(x_, norm.weight, norm.epsilon, then.inner(out), rounded, add)
        return out, Normed(x_, inverse, norm.weight, norm.epsilon)

    def _normed_result(self, which: int, y: torch.Tensor) -> tuple[torch.Tensor, Normed]:
        norm, out = self._result_norms[which], torch.empty_like(y)
        inverse = pointwise.rms_norm_(y, norm.weight, norm.epsilon, out)
        return out, Normed(y, inverse, norm.weight, norm.epsilon)

    def _queries_and_keys(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.unflatten(packed[:, : (self._heads + self._shared_heads) * self._dim], 1, (-1, self._dim))

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
        behind: _Behind,
        *,
        of_x: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The gradients of x, if `of_x` asks for it, and of the trained parameters in the order of `_products`.

        `kept_` cannot be used again: its gate is overwritten by a gradient, and parts of it are freed early.
        """
        (of_middle, rounded), of_gates, of_down = self._gate_backward_(of_out, seeds, kept_, behind)
        del kept_.gate_up, kept_.gate_up_whole, kept_.second_normed
        packed, of_output = self._attention_backward_(of_middle, rounded, seeds, kept_)
        of_normed, of_narrow = self.inputs.input_gradient_(packed, seeds[_ATTENTION_INPUTS], wanted=of_x)
        of_inputs = self.inputs.in_order(
            self.inputs.of_a(of_narrow, kept_.first_normed, seeds[_ATTENTION_INPUTS]),
            self.inputs.of_b(packed, kept_.narrow_inputs),
        )
        gradient = None
        if of_x:  # with room for the border of the layer before this one, whose result may be normed first
            wide = torch.empty_like(of_normed) if self._result_norms else self.down.new_output(of_normed)
            gradient = self._norm_backward(of_normed, kept_.first_normed, of_middle, wide)[:, : of_normed.shape[1]]
            if not self._result_norms:  # whose layers do not ask for it
                self._workspace.leave_gradient(wide)
        return gradient, [*of_inputs, *of_output, *of_gates, *of_down]

    def _gate_backward_(
        self, of_out: torch.Tensor, seeds: Sequence[Draw], kept_: _Kept, behind: _Behind
    ) -> tuple[tuple[torch.Tensor, Rounded | None], list[torch.Tensor], list[torch.Tensor]]:
        """The gradients of the states between attention and gate, with `output`'s border, and of the adapters."""
        if behind.normed is None:
            of_down_out = self._with_border(of_out)
        else:
            of_down_out = self._norm_backward(of_out.contiguous(), behind.normed, None, self.down.new_output(of_out))
        of_act, of_narrow = self.down.input_gradient_(of_down_out, seeds[_DOWN])
        rounded = self.gates.rounded_output(of_out)
        of_down_a, of_gates_b = self._gated_backward_(of_act, of_narrow, rounded, seeds, kept_)
        of_down = self.down.in_order(of_down_a, self.down.of_b(of_down_out, behind.narrow))
        del of_act, of_down_out
        of_normed, of_narrow = self.gates.input_gradient_(kept_.gate_up_whole, seeds[_GATES], rounded=rounded)
        del rounded
        of_gates = self.gates.in_order(self.gates.of_a(of_narrow, kept_.second_normed, seeds[_GATES]), of_gates_b)
        rounded = None if self._result_norms else self.output.rounded_output(of_out)
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
            act = pointwise.gated_backward_(of_act, kept_.gate_up, rounded, gelu=self._gelu)
            return self.down.of_a(of_narrow, act, seeds[_DOWN]), self.gates.of_b(kept_.gate_up, kept_.narrow_gates)
        if of_narrow is not None:
            of_narrow = of_narrow[:, self.down.adapters[0].ranks]
        parts: list[torch.Tensor | None] = [None, None]
        scales = [1.0, 1.0]
        if self._gates_apart:
            for adapter in self.gates.adapters:
                assert kept_.narrow_gates is not None
                parts[adapter.seed], scales[adapter.seed] = kept_.narrow_gates[:, adapter.ranks], adapter.scale
        beside = pointwise.Beside(of_narrow, parts[0], parts[1], (scales[0], scales[1]))
        of_a, *of_b = pointwise.gated_backward_adapted_(of_act, kept_.gate_up, beside, gelu=self._gelu)
        of_gates = [part for part in of_b if part is not None]
        if not self._gates_apart:
            of_gates = self.gates.of_b(kept_.gate_up, kept_.narrow_gates)
        return [] if of_a is None else [of_a], of_gates

    def _attention_backward_(
        self, of_middle_: torch.Tensor, rounded: Rounded | None, seeds: Sequence[Draw], kept: _Kept
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The gradients of `inputs`' results, with room for its border, and of the adapter."""
        if kept.attention is not None:
            rounded = self.output.rounded_output(of_middle_)
            room = self.output.new_output(of_middle_)
            of_middle_ = of_middle_[:, : kept.attention.x.shape[1]].contiguous()
            of_middle_ = self._norm_backward(of_middle_, kept.attention, None, room, rounded)
        of_attended, of_narrow = self.output.input_gradient_(of_middle_, seeds[_ATTENTION_OUTPUT], rounded=rounded)
        of_output = self.output.in_order(
            self.output.of_a(of_narrow, kept.attended.out, seeds[_ATTENTION_OUTPUT]),
            self.output.of_b(of_middle_, kept.narrow_output),
        )
        packed = self.inputs.new_output(of_attended)
        kept.attended.gradients_into_(of_attended, packed)
        if self._head_norm is not None:
            assert kept.heads is not None
            norm, of_heads = self._head_norm, self._queries_and_keys(packed)
            pointwise.norm_heads_backward_(of_heads, kept.heads, norm.weight, norm.epsilon)
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
        gradient: torch.Tensor,
        of: Normed,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        rounded: Rounded | None = None,
    ) -> torch.Tensor:
        return pointwise.rms_norm_backward(gradient, of.x, of.weight, of.epsilon, residual, out, rounded)


class _Layer(torch.autograd.Function):
    """Autograd's view of a `FusedLayer`: a function of its input and its adapters' weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FusedLayer, rows: Rows, seeds: Sequence[Draw], *trained: torch.Tensor
    ) -> torch.Tensor:
        with _without_autocast(x.device.type):
            out, kept, behind = layer.forward(x, rows, seeds)
        ctx.layer, ctx.rows, ctx.seeds = layer, rows, seeds
        ctx.save_for_backward(x)
        # not by save_for_backward, which only takes tensors
        ctx.kept, ctx.behind = None, None
        if any(ctx.needs_input_grad):
            ctx.kept, ctx.behind = kept if layer.kept else None, behind
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
                ctx.seeds, kept, ctx.behind, of_x=ctx.needs_input_grad[0],
            )  # fmt: skip
        return of_x, None, None, None, *of_trained


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off if it is on: all types are right already. Entering it costs the host more than a launch."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()


def _head_norm(attention: Any, decoder: Decoder) -> Norm:
    """The norms of queries and keys as one, with a weight per head: (heads + shared_heads, head_dim)."""
    query, key = (Norm.of(norm, decoder) for norm in (attention.q_norm, attention.k_norm))
    counts = (decoder.heads, decoder.shared_heads)
    weights = [norm.weight.detach().expand(count, -1) for norm, count in zip((query, key), counts, strict=True)]
    return Norm(torch.cat(weights).contiguous(), query.epsilon)


def can_fuse(model: PeftModel, decoder: Decoder, weights: Weights) -> bool:
    """Whether all decoder layers are those of `decoder`, with linear layers that `weights` can hold."""
    layers = getattr(model.get_base_model().base_model, "layers", [])
    name = decoder.architecture.layer
    known = all(type(layer).__name__ == name and _has_known_weights(layer, decoder, weights) for layer in layers)
    return len(layers) == decoder.layers and known


def _has_known_weights(layer: Any, decoder: Decoder, weights: Weights) -> bool:
    """4-bit plans need layers with the same input to be all plain or all 4-bit; other plans make them plain."""
    for owner, names in (
        (layer.self_attn, decoder.architecture.inputs), (layer.self_attn, ("o_proj",)),
        (layer.mlp, decoder.architecture.gates), (layer.mlp, ("down_proj",)),
    ):  # fmt: skip
        bases = [base_of(getattr(owner, name)) for name in names]
        quantized = [isinstance(base, bnb.nn.Linear4bit) for base in bases]
        plain = [type(base) is torch.nn.Linear and base.weight.is_floating_point() for base in bases]
        if not all(one or other for one, other in zip(quantized, plain, strict=True)):
            return False
        if weights == "4-bit" and any(quantized) and not all(quantized):
            return False
    return True


def fuse_layer(
    model: PeftModel, index: int, decoder: Decoder, weights: Weights, workspace: Workspace, patches: Patches
) -> FusedLayer:
    """Replace the forward pass of layer `index` by a fused one. Check `can_fuse` first.

    All layers of a model share one workspace.
    """
    layer = model.get_base_model().base_model.layers[index]
    fused = FusedLayer(layer, index, decoder, weights, workspace, patches)
    patches.replace(layer, "forward", fused)
    return fused
