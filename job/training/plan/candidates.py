"""The candidate plans for computing a training step on a card, with their predicted memory and time.

A plan decides where numbers are kept and how many tokens are computed at once. It never changes what a step computes:
the batch, the loss and the gradients are those of the settings. The predictions are for the fused layers in
`model/fused` and count what those keep. This file does not import torch, so `entrypoint.py plan` answers immediately
and without a GPU.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from job.settings import Settings
from job.training.plan.cards import Card
from job.training.plan.load import Load, Shape

Weights = Literal["4-bit", "resident", "fp8"]

_HEAD_TOKENS = 4096  # tokens whose logits exist at once
_ELEMENT = 2  # bytes of a 16-bit number
_TRAINED = 4  # bytes of a trained weight, and of its gradient
_CAPTURED_STEP = 128  # `STEP` of captured passes
_MOST_CAPTURED = 4096  # tokens of a captured pass


@dataclass(frozen=True)
class Plan:
    """One way to compute a step.

    `recomputed` layers keep little more than their input for the backward pass (gradient checkpointing). At most
    `micro_batch_tokens` are computed at once, unless a single row is longer. A batch is computed in `parts`. Parts of at
    most `captured_tokens` are launched as CUDA graphs. Its bytes and seconds are predictions, `expected_seconds` over
    hosts of different speed, `seconds` with a usual one.
    """

    weights: Weights
    recomputed: int
    micro_batch_tokens: int
    parts: int
    longest_row: int = 1
    captured_tokens: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    expected_seconds: float = 0.0

    def described(self, layers: int) -> str:
        held = {"4-bit": "4-bit weights", "resident": "weights dequantized to 16 bits", "fp8": "8-bit float weights"}
        recomputed = f"gradient checkpointing in {self.recomputed} of {layers} layers"
        told = f"{held[self.weights]}, {recomputed}, at most {self.micro_batch_tokens:,} tokens at once"
        return told + (f", CUDA graphs up to {self.captured_tokens:,} tokens" if self.captured_tokens else "")


def plans(shape: Shape, load: Load, card: Card, settings: Settings) -> Iterator[Plan]:
    """Every plan that the settings allow, with its predicted memory and time."""
    for weights in _weights(settings):
        for parts in _parts(load, settings):
            tokens = max(math.ceil(load.largest_batch / parts), min(load.longest_row, load.largest_batch))
            if settings.micro_batch_tokens != "auto":
                tokens = min(settings.micro_batch_tokens, load.largest_batch)
            for recomputed in _recomputed(shape, settings):
                plain = Plan(weights, recomputed, max(tokens, min(load.longest_row, load.largest_batch)), parts)
                captured = replace(plain, captured_tokens=worth_capturing(shape, plain, load, card))
                for plan in (plain, captured) if captures(settings) else (plain,):
                    yield replace(
                        plan,
                        micro_batch_tokens=tokens,
                        longest_row=load.longest_row,
                        memory_bytes=round(predicted_bytes(shape, plan, settings, card)),
                        seconds=predicted_seconds(shape, plan, load, card),
                        expected_seconds=statistics.fmean(
                            predicted_seconds(shape, plan, load, card, host) for host in _HOSTS
                        ),
                    )


def captures(settings: Settings) -> bool:
    """Whether short passes may be launched as CUDA graphs. float16 has a gradient scaler, which reads from the GPU."""
    return settings.cuda_graphs and settings.bnb_4bit_compute_dtype != "float16"


def worth_capturing(shape: Shape, plan: Plan, load: Load, card: Card) -> int:
    """Up to which size passes are worth capturing: longer ones take the GPU so long that the host keeps up."""
    per_token, _, launched = _costs(shape, plan, load, card)
    most = min(_SLOW_HOST * launched / per_token, plan.micro_batch_tokens, _MOST_CAPTURED)
    return math.ceil(most / _CAPTURED_STEP) * _CAPTURED_STEP


def _weights(settings: Settings) -> tuple[Weights, ...]:
    if settings.frozen_precision == "fp8":
        return ("fp8",)
    if not settings.use_4bit or settings.resident_weights is True:
        return ("resident",)
    return ("4-bit",) if settings.resident_weights is False else ("resident", "4-bit")


def _recomputed(shape: Shape, settings: Settings) -> tuple[int, ...]:
    if settings.recomputed_layers != "auto":
        return (min(settings.recomputed_layers, shape.layers),)
    if settings.gradient_checkpointing != "auto":
        return (shape.layers if settings.gradient_checkpointing else 0,)
    return tuple(range(shape.layers + 1))


def _parts(load: Load, settings: Settings) -> tuple[int, ...]:
    if settings.micro_batch_tokens != "auto":
        return (math.ceil(load.largest_batch / settings.micro_batch_tokens),)
    most = max(1, load.largest_batch // max(1, load.longest_row))
    return tuple(2**power for power in range(most.bit_length()))


# -- memory -----------------------------------------------------------------------------------------------------------


def predicted_bytes(shape: Shape, plan: Plan, settings: Settings, card: Card) -> float:
    """Predict torch's peak of allocated memory, without a paged optimizer's state, which makes room for others."""
    most, least = _activation_bytes(shape, plan, card)
    gradients = shape.layers * shape.layer_adapter * _TRAINED
    # They grow while the layers' inputs are freed. Only a later part of a step starts with all of them.
    held = gradients if plan.parts > 1 or settings.gradient_accumulation_steps > 1 else 0
    peak = max(most + held, least + gradients)
    if plan.captured_tokens:  # in memory of their own; gradients are always held
        most_captured, _ = _activation_bytes(shape, replace(plan, micro_batch_tokens=plan.captured_tokens), card)
        peak = max(most, least) + gradients + most_captured * _CAPTURED_FRAGMENTS
    return weight_bytes(shape, plan.weights, settings) + peak


_CAPTURED_FRAGMENTS = 1.1  # sizes are captured as they come, and their memory does not always fit into one another


def weight_bytes(shape: Shape, weights: Weights, settings: Settings) -> float:
    """The bytes of frozen weights, adapter and optimizer state."""
    bordered = sum((outputs + rank) * (inputs + rank) for inputs, outputs, rank in shape.groups) * _ELEMENT
    if weights == "resident":
        frozen: float = shape.layers * bordered
    elif weights == "fp8":
        frozen = (
            sum(2 * inputs * outputs + 4 * (inputs + outputs) for inputs, outputs, _ in shape.groups) * shape.layers
        )
    else:
        scale_bytes = 1 / 64 + 4 / (64 * 256) if settings.use_nested_quant else 4 / 64
        frozen = shape.layers * shape.layer_weights * (0.5 + scale_bytes) + bordered
    decoder = shape.decoder
    embeddings = decoder.vocabulary * decoder.hidden * _ELEMENT * (1 if decoder.tied else 2)
    norms = (2 * shape.layers + 1) * decoder.hidden * _ELEMENT
    trained = shape.layers * shape.layer_adapter
    moments = 0 if settings.optim.startswith("paged_") else 2 if "8bit" in settings.optim else 2 * _TRAINED
    return frozen + embeddings + norms + trained * (_TRAINED + moments)


def _activation_bytes(shape: Shape, plan: Plan, card: Card) -> tuple[float, float]:
    """When all layers have been computed, and when the backward pass has come to the first one."""
    decoder, architecture = shape.decoder, shape.decoder.architecture
    hidden, gate, query, packed = decoder.hidden, decoder.intermediate, decoder.query, decoder.packed
    ranks = sum(rank for _, _, rank in shape.groups)
    behind = hidden if architecture.sandwich else 0  # results before their norms
    own = card.own_attention and decoder.head_dim in (64, 128)
    repeated = 2 * query  # copies of keys and values for each query head
    if own or decoder.shared_heads == decoder.heads:
        repeated = 0
    kept: float = packed + query + hidden + 2 * gate + shape.groups[2][2] + ranks + decoder.heads * 4 / _ELEMENT
    kept += repeated + behind + (query + (packed - query) / 2 if architecture.head_norms else 0)
    behind_gate = 2 * hidden + 2 * gate
    behind_attention = hidden + 3 * query + 2 * packed + repeated - 2 * gate - hidden
    # The last layers are kept. When the first one that is recomputed needs its memory, theirs is free again.
    at_once = kept if plan.recomputed == shape.layers else 0.0
    all_layers: float = shape.layers * (hidden + behind) + plan.recomputed * shape.groups[3][2]
    all_layers += (shape.layers - plan.recomputed) * kept
    per_token = all_layers + at_once + max(behind_gate, behind_attention)
    capped = 2 if decoder.head_softcap is not None else 0  # the cap's slope, and what it is computed from
    head = min(plan.micro_batch_tokens, _HEAD_TOKENS) * decoder.vocabulary * (1 + capped)
    in_head = 4 * plan.micro_batch_tokens * hidden + head
    tokens = plan.micro_batch_tokens
    first = kept + hidden + behind + max(behind_gate, behind_attention)
    return _ELEMENT * max(tokens * per_token, tokens * all_layers + in_head), _ELEMENT * tokens * first


# -- time -------------------------------------------------------------------------------------------------------------

_NARROW = 0.45  # an adapter's products, relative to the rate of large products
# Attention, relative to the same: in short rows, what long ones add, and the tokens of a row at which half is added
_ATTENTION, _LONG, _HALF = 0.42, 0.18, 3000
_TRAFFIC = 0.9  # achieved fraction of the bandwidth
_FP8 = 1.52  # 8-bit products, relative to the 16-bit rate, including the rounding
# Seconds that a slow CPU needs to launch one layer's kernels, forward and backward, and the fraction that recomputing
# adds
_LAUNCH: dict[Weights, tuple[float, float]] = {"resident": (3e-3, 0.45), "4-bit": (3.3e-3, 0.5), "fp8": (3.7e-3, 0.5)}
_DROPPED = 10  # passes over an adapter's input that its dropout adds: drawn three times, and a product less is shared
_RAMP_SECONDS = 0.2e-3  # lost per layer because kernels ramp up and run out


_SLOW_HOST = 1.5  # a host may need so much longer for its launches than _LAUNCH says, beside others of the same kind
# The cores of rented machines are shared: hosts have needed 1.0 to 2.2 times as long as _LAUNCH says (docs/log.md)
_HOSTS = (1.0, 1.5, 2.0)


def predicted_seconds(shape: Shape, plan: Plan, load: Load, card: Card, host: float = 1.0) -> float:
    """Predict the mean seconds of a batch's forward and backward pass.

    `host` is how long this machine needs to launch kernels, relative to the usual.
    """
    per_token, per_part, launched = _costs(shape, plan, load, card)

    def seconds(tokens: float, parts: int) -> float:
        if tokens / parts <= plan.captured_tokens:
            return (tokens + parts * _CAPTURED_STEP / 2) * per_token + parts * per_part
        return max(tokens * per_token + parts * per_part, parts * launched * host)

    return statistics.fmean(seconds(tokens, _parts_of(tokens, plan, load)) for tokens in load.batches)


def _costs(shape: Shape, plan: Plan, load: Load, card: Card) -> tuple[float, float, float]:
    """Seconds that the GPU needs per token and per part, and that the host needs to launch a part."""
    rate, bandwidth = card.matmul_flops, card.bandwidth * _TRAFFIC
    again = plan.recomputed / shape.layers
    decoder = shape.decoder
    hidden = decoder.hidden
    large = shape.layers * (4 * shape.layer_weights + again * 2 * (shape.layer_weights - shape.groups[3][0] * hidden))
    large /= rate * (_FP8 if plan.weights == "fp8" else 1.0)
    large += 4 * decoder.vocabulary * hidden / rate
    narrow = shape.layers * (6 + 2 * again) * shape.layer_adapter / (rate * _NARROW)
    contexts = sum(_context(load.mean_context, window) for window in decoder.windows)
    efficiency = _ATTENTION + _LONG * load.mean_context / (load.mean_context + _HALF)
    attention = 2 * decoder.query * contexts * (3.5 + again) / (rate * efficiency)
    passes = 26 * hidden + 6 * decoder.packed + 11 * decoder.intermediate
    passes += 9 * hidden if decoder.architecture.sandwich else 0
    passes += 5 * decoder.packed if decoder.architecture.head_norms else 0
    passes += _DROPPED * shape.adapted_inputs if shape.drops else 0
    traffic = shape.layers * _ELEMENT * passes * (1 + 0.3 * again) / bandwidth
    per_batch = 0.0
    if plan.weights == "4-bit":
        per_batch = shape.layers * shape.layer_weights * (2 + again) * 2.6 / (0.5 * bandwidth)
    launch, more = _LAUNCH[plan.weights]
    per_token = large + narrow + attention + traffic
    return per_token, per_batch + shape.layers * _RAMP_SECONDS, shape.layers * launch * (1 + more * again)


def _context(row: float, window: int | None) -> float:
    """The length of a row in which tokens would attend to as many others as with the window in a row of this length."""
    return row if window is None or window >= row else window * (2 - window / row)


_FEW = 8  # rows of a part, below which whole rows matter: with more, the last row that does not fit wastes little


def _parts_of(tokens: float, plan: Plan, load: Load) -> int:
    """The number of parts in which a batch is computed, since rows are never cut."""
    at_once = plan.micro_batch_tokens * load.rows / tokens + 1e-6
    if at_once < _FEW:
        at_once = max(1, int(at_once))
    return math.ceil(load.rows / at_once)
