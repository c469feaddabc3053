"""The check that the fused layers give the model's own results, on this very machine.

Kernels are compiled again for each card, compiler and driver. So before hours are spent on their gradients, one layer of
each kind is computed three times on a few tokens: by the fused layer, by transformers and peft in the type of training, and
in float32, which is the judge. The fused layer may be at most `_WORSE` times as far from the judge as the plain layer is.

The adapters are made large enough to matter, and are changed after the fused layer has used them. Some tokens are so small
that the norms' epsilon matters. Masks of dropout are read out of the layer's own drawing, and given to the judge. A window
that is longer than the proof's rows is made shorter for the proof. The judge is computed on the CPU, on few tokens, where
the GPU's memory does not hold a layer in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from job.model.architectures import Decoder
from job.model.changes import ADAPTER
from job.model.fused import MANY_TOKENS
from job.model.fused.head import LastNorm, label_log_probs
from job.model.fused.judge import Judge, plain_loss
from job.model.fused.layer import FusedLayer
from job.model.fused.products import base_of
from job.model.quantization import full_weight

FEW = (48, 16)  # tokens of each row
MANY = (MANY_TOKENS // 2, MANY_TOKENS // 2 - 100, 100)
# How much further from the judge than the plain layer: a whole result, and its worst row. That one differs more by chance:
# of 80 right layers on an H200, one had 2.1.
_WORSE = (2.0, 3.0)
_FLOOR = 1e-4  # differences that float32's own roundings make
# Of 8-bit products: the largest difference of a whole result, and of a single row. An H200 gave up to 0.22 and 0.45, and
# 0.37 for Gemma 2's sharp scores. Whatever is finer is caught by the same layer in 16 bits.
_FP8 = (0.45, 1.0)
_SHARE = 0.3  # of a linear layer's result that comes from the adapter
_TINY = 4  # each such token is about as small as the norms' epsilon
_WINDOW = 16  # for the proof of layers whose window is longer than its rows
_HEAD_ROWS = 3 * 4096 + 512  # of the vocabulary, whose head is proved: some of its kernel's blocks, and a part of one


@dataclass(frozen=True)
class Sample:
    """One layer's results for some tokens, without the residual that only passed through. In float32."""

    change: torch.Tensor
    of_input: torch.Tensor
    of_adapters: tuple[torch.Tensor, ...]

    def differences(self, judge: Sample) -> Differences:
        """How far from `judge` these results are, or infinity where one is not finite."""
        found = []
        for one, two in zip(self._all(), judge._all(), strict=True):
            away, size = (one - two).norm(dim=1), two.norm(dim=1)
            typical = size.square().mean().sqrt().clamp(min=1e-20)
            worst = (away / (size + typical)).max()
            found.append((_or_infinite(away.norm() / size.norm().clamp(min=1e-20)), _or_infinite(worst)))
        return Differences(tuple(found))

    def _all(self) -> tuple[torch.Tensor, ...]:
        return (self.change, self.of_input, *self.of_adapters)


def _or_infinite(value: torch.Tensor) -> float:
    return float(value) if bool(value.isfinite()) else math.inf


@dataclass(frozen=True)
class Differences:
    """Per result (output, input's gradient, each adapter's gradient): the relative difference of the whole, and of the worst row."""

    found: tuple[tuple[float, float], ...]

    def exceed(self, allowed: Sequence[tuple[float, float]]) -> str | None:
        """Which result is further away than allowed, and how far. None if none is."""
        for place, (one, most) in enumerate(zip(self.found, allowed, strict=True)):
            names = ("its output", "its input's gradient")
            name = names[place] if place < len(names) else f"gradient {place - len(names) + 1} of its adapters"
            for value, limit, what in zip(one, most, ("as a whole", "in one row"), strict=True):
                if not value <= limit:
                    return f"{name} differs by {value:.2%} {what}, and {limit:.2%} is allowed"
        return None


@dataclass(frozen=True)
class _Case:
    """Rows of these lengths, computed with another window than the layer's own if `window` is given."""

    lengths: tuple[int, ...]
    window: int | None = None


class Proof:
    """Compares layers of a model before and after they are fused. `prepare` comes before, `failure` after it.

    `many` says whether training computes so many tokens at once that other kernels do it. `free_bytes` are those of the
    device that the proof may use.
    """

    def __init__(self, model: PeftModel, decoder: Decoder, *, many: bool, free_bytes: float = math.inf) -> None:
        self._model, self._decoder = model, decoder
        device = model.get_base_model().base_model.embed_tokens.weight.device
        in_float32 = 4 * decoder.hidden * (decoder.packed + decoder.query + 3 * decoder.intermediate)
        # About what they take. If it is more, the proof runs out of memory and is tried again with less (`Execution`).
        activations = sum(MANY) * 7 * (decoder.hidden + decoder.packed + decoder.intermediate)
        scores = decoder.heads * sum(length**2 for length in MANY)
        self._on = device if 2.5 * in_float32 < free_bytes else torch.device("cpu")
        self._lengths = [FEW, MANY] if many and 2 * in_float32 + 4 * (activations + scores) < free_bytes else [FEW]
        self._adapters: list[torch.Tensor] = []
        self._judged: dict[_Case, tuple[Judge, Sample, Differences]] = {}

    def kinds(self) -> list[int]:
        """The first layer of each kind: with its window, with or without positions, and with weights in 4 bits or not."""
        held = [self._held(self._layer(index)) for index in range(self._decoder.layers)]
        of_layers = list(zip(self._decoder.windows, self._decoder.rotates, held, strict=True))
        return [of_layers.index(kind) for kind in dict.fromkeys(of_layers)]

    def _held(self, layer: Any) -> tuple[bool, ...]:
        """Which linear layers have 4-bit weights."""
        names = self._decoder.architecture.linear
        owners = [layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp for name in names]
        bases = [base_of(getattr(owner, name)) for owner, name in zip(owners, names, strict=True)]
        return tuple(isinstance(base, bnb.nn.Linear4bit) for base in bases)

    def _cases(self, index: int) -> list[_Case]:
        window = self._decoder.windows[index]
        cases = [_Case(lengths) for lengths in self._lengths]
        if window is not None and window >= max(FEW):
            cases.append(_Case(FEW, _WINDOW))
        return cases

    def prepare(self, index: int) -> None:
        """Compute layer `index`, which is not fused yet, in the type of training and in float32. Forgets other layers."""
        layer = self._layer(index)
        self._judged.clear()
        self._adapters = _large_adapters(layer)
        with _with_adapters(layer, self._adapters):
            judge = Judge(layer, index, self._on)
            for case in self._cases(index):
                with _windowed(judge.layer, case.window), _windowed(layer, case.window):
                    wanted = self._sample(judge.layer, index, case.lengths, judge.trained, judge.device)
                    plain = self._sample(layer, index, case.lengths, _trained(layer))
                self._judged[case] = judge, wanted, plain.differences(wanted)

    def failure(self, index: int, fused: FusedLayer, *, eight_bit: bool = False) -> str | None:
        """What is wrong with layer `index`, which was prepared last and is now fused, with 8-bit products or not.

        None if nothing is.
        """
        layer = self._layer(index)
        kept, scores = fused.kept, fused.scores
        try:
            for case, (judge, wanted, plain) in self._judged.items():
                allowed = [_allowed(one, eight_bit) for one in plain.found]
                if case.window is not None:
                    fused.scores = replace(scores, window=case.window)
                self._sample(layer, index, case.lengths, _trained(layer))  # with the adapters that it has now
                with _with_adapters(layer, self._adapters), _windowed(judge.layer, case.window):
                    for fused.kept in (True, False):
                        how = "kept" if fused.kept else "recomputed"
                        found = self._sample(layer, index, case.lengths, _trained(layer)).differences(wanted)
                        if (reason := found.exceed(allowed)) is not None:
                            return f"a {how} layer: {reason}"
                        reason = self._dropped(judge, index, fused, case.lengths, allowed)
                        if reason is not None:
                            return f"a {how} layer with dropout: {reason}"
                fused.scores = scores
        finally:
            fused.kept, fused.scores = kept, scores
        return None

    def forget(self) -> None:
        """Free what was computed for the last layer."""
        self._judged.clear()

    def _dropped(
        self,
        judge: Judge,
        index: int,
        fused: FusedLayer,
        lengths: Sequence[int],
        allowed: Sequence[tuple[float, float]],
    ) -> str | None:
        layer = self._layer(index)
        masks = fused.dropout_masks(sum(lengths))
        if not masks:
            return None
        for probability, mask in masks.values():
            dropped = float((mask == 0).float().mean())
            spread = math.sqrt(probability * (1 - probability) / mask.numel())
            if abs(dropped - probability) > 8 * spread:
                return f"{dropped:.2%} of the values are dropped, not {probability:.2%}"
        factors = {name: ((mask != 0) / (1 - p)).to(judge.device) for name, (p, mask) in masks.items()}
        with judge.dropping(factors):
            wanted = self._sample(judge.layer, index, lengths, judge.trained, judge.device)
        training = layer.training
        layer.train(True)
        try:
            found = self._sample(layer, index, lengths, _trained(layer), training=True)
        finally:
            layer.train(training)
        return found.differences(wanted).exceed(allowed)

    def head_failure(self) -> str | None:
        """What is wrong with the loss over the fused head. None if nothing is."""
        base: Any = self._model.get_base_model()
        embedded, generator = self._embedded(base.base_model, FEW)
        whole = base.get_output_embeddings().weight
        head = whole[: _HEAD_ROWS + len(whole) % 16]  # all would take as much memory as the layers' judge
        norm = LastNorm.of(base.base_model.norm, self._decoder)
        states = embedded.detach()[0]
        labels = torch.randint(len(head), (len(states),), generator=generator).to(states.device)
        labels[::5] = -100
        factors = torch.rand(len(states), generator=generator).to(states.device)
        samples = []
        for dtype, way in ((torch.float32, plain_loss), (states.dtype, plain_loss), (states.dtype, label_log_probs)):
            x = states.to(dtype).requires_grad_()
            with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
                found = way(x, norm, head.to(dtype), labels)
                (of_x,) = torch.autograd.grad((found.float() * factors).sum(), x)
            samples.append(Sample(found.detach().float().unsqueeze(1), of_x.float(), ()))
        judge, plain, fused = samples
        allowed = [_allowed(one, False) for one in plain.differences(judge).found]
        reason = fused.differences(judge).exceed(allowed)
        return None if reason is None else f"the head: {reason}"

    def _layer(self, index: int) -> Any:
        return self._model.get_base_model().base_model.layers[index]

    def _embedded(self, base: Any, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Generator]:
        """Embeddings of random tokens, some of which are scaled down: (1, tokens, width)."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(base.embed_tokens.num_embeddings, (1, sum(lengths)), generator=generator)
        x = base.embed_tokens(ids.to(base.embed_tokens.weight.device)).detach()
        small = LastNorm.of(base.norm, self._decoder).epsilon ** 0.5 / x.float().square().mean().sqrt().clamp(min=1e-20)
        x[:, ::_TINY] *= small.clamp(max=1.0).to(x.dtype)
        return x, generator

    def _sample(
        self,
        layer: Any,
        index: int,
        lengths: Sequence[int],
        trained: Sequence[torch.Tensor],
        judged_on: torch.device | None = None,
        *,
        training: bool = False,
    ) -> Sample:
        """Compute `layer`, as it is now, on random rows of these lengths, or the judge in float32 on its device."""
        base: Any = self._model.get_base_model().base_model
        embedded, generator = self._embedded(base, lengths)
        home = embedded.device
        x = (embedded if judged_on is None else embedded.float().to(judged_on)).requires_grad_()
        device = x.device
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        of_out = torch.randn(x.shape, generator=generator).to(x)
        kinds = getattr(base.config, "layer_types", None)
        named = {"layer_type": kinds[index]} if kinds and hasattr(base.rotary_emb, "layer_types") else {}
        half = x.dtype != torch.float32
        mode = layer.training
        layer.train(training)
        try:
            with torch.enable_grad(), torch.autocast(device.type, dtype=x.dtype if half else None, enabled=half):
                out = layer(
                    x,
                    position_ids=positions,
                    position_embeddings=tuple(
                        part.to(device) for part in base.rotary_emb(x.to(home), positions.to(home), **named)
                    ),
                    attention_mask=None,
                    cu_seq_lens_q=boundaries,
                    cu_seq_lens_k=boundaries,
                    max_length_q=max(lengths),
                    max_length_k=max(lengths),
                )
            out = out[0] if isinstance(out, tuple) else out
            of_x, *of_trained = torch.autograd.grad(out, [x, *trained], of_out.to(out.dtype))
        finally:
            layer.train(mode)
        return Sample(
            (out.detach().float() - x.detach().float())[0].to(home),
            (of_x.float() - of_out.float())[0].to(home),
            tuple(gradient.detach().float().to(home) for gradient in of_trained),
        )


def _allowed(plain: tuple[float, float], eight_bit: bool) -> tuple[float, float]:
    bars = [max(worse * one, _FLOOR) for worse, one in zip(_WORSE, plain, strict=True)]
    return (max(bars[0], _FP8[0]), max(bars[1], _FP8[1])) if eight_bit else (bars[0], bars[1])


def _trained(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def _large_adapters(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Random values for the layer's adapters that make about `_SHARE` of the linear layers' results, as in `_trained`."""
    generator = torch.Generator().manual_seed(1)
    found: dict[torch.nn.Parameter, torch.Tensor] = {}
    for wrapped in layer.modules():
        if isinstance(wrapped, LoraLayer) and ADAPTER in wrapped.lora_A:
            a, b, scale = wrapped.lora_A[ADAPTER].weight, wrapped.lora_B[ADAPTER].weight, wrapped.scaling[ADAPTER]
            frozen = float(full_weight(base_of(wrapped)).float().std()) * math.sqrt(a.shape[1])
            found[a] = torch.randn(a.shape, generator=generator) / math.sqrt(a.shape[1])
            found[b] = torch.randn(b.shape, generator=generator) * _SHARE * frozen / (abs(scale) * math.sqrt(len(a)))
    return [found[parameter].to(parameter) for parameter in _trained(layer)]


@contextlib.contextmanager
def _with_adapters(layer: torch.nn.Module, values: Sequence[torch.Tensor]) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in _trained(layer)]
    _set(layer, values)
    try:
        yield
    finally:
        _set(layer, before)


@contextlib.contextmanager
def _windowed(layer: Any, window: int | None) -> Iterator[None]:
    """Give transformers' layer another window, where it keeps its own: in its attention, or in the config. None: its own."""
    if window is None:
        yield
        return
    attention = layer.self_attn
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    before, owner.sliding_window = owner.sliding_window, window
    try:
        yield
    finally:
        owner.sliding_window = before


@torch.no_grad()
def _set(layer: torch.nn.Module, values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(_trained(layer), values, strict=True):
        parameter.copy_(value)
