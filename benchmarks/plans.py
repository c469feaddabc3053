"""Compare the planner with measurements on this GPU: `python -m benchmarks.plans --model FOLDER`.

It times a forward and backward pass of every kind of plan, without an optimizer. Short passes are launched as CUDA graphs,
as in training; their memory is that of the first pass, which is not, and what the graph holds beside it. Plans between the measured numbers of
recomputed layers are interpolated, because every layer adds the same time and memory. For each memory cap, the fastest
plan that fits by these figures is then measured, alternating with the planner's choice. `host ms` is how long this
process took to launch a whole pass: where that is as long as the pass, a faster card would not help.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from job.model.adapters import hold_adapter_in_float32
from job.model.architectures import Decoder
from job.model.attention import register_varlen
from job.model.fused.head import fuse_head
from job.model.fused.layer import FusedLayer, Weights, fuse_layer
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from job.model.quantization import four_bit_config
from job.settings import Settings
from job.training.captured import CapturedPasses, Result, filled
from job.training.gradients import FlatGradients
from job.training.plan.candidates import Plan, plans, predicted_bytes, predicted_seconds, worth_capturing
from job.training.plan.cards import GIB, Card, card_named
from job.training.plan.choose import choose
from job.training.plan.load import Load, Shape

LENGTH = 2048
CONTEXT_GIB = 0.6  # what CUDA itself uses on a card


class Pass(NamedTuple):
    """What is computed at once: rows of at most `length` tokens."""

    length: int
    tokens: int

    @classmethod
    def named(cls, name: str) -> Pass:
        """Of `TOKENS`, or `LENGTH:TOKENS`."""
        length, _, tokens = name.rpartition(":")
        return cls(int(length or LENGTH), int(tokens))


class Measurement(NamedTuple):
    """Seconds of a forward and backward pass, its peak in GiB, and the seconds that the host took to launch it."""

    seconds: float
    gib: float
    of_host: float


class Bench:
    """The model with the weights that were last requested, and documents.

    They have guanaco's lengths, in longer rows than 2,048 tokens as many times as long.
    """

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(lora_target_modules="all-linear", lora_dropout=0, packing=True)
        self.shape = Shape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")), self.settings)
        card = card_named(torch.cuda.get_device_name())
        assert card is not None, "needs a card that the planner knows"
        self.card: Card = card
        self.model = _load(folder, self.settings, self.shape.decoder)
        self._layers: list[FusedLayer] = []
        self._patches = Patches()
        self._patches.settle_weights()  # two copies of a 7B would not fit

    def take(self, weights: Weights) -> None:
        self._layers = []
        self._patches.undo()  # they hold the layers of before, and those their weights
        decoder, self._workspace = self.shape.decoder, Workspace(self._patches)
        self._layers = [
            fuse_layer(self.model, index, decoder, weights, self._workspace, self._patches)
            for index in range(decoder.layers)
        ]
        gc.collect()  # frees the previous weights
        torch.cuda.empty_cache()

    def measure(self, recomputed: int, size: Pass, *, captured: bool, runs: int = 3) -> Measurement:
        for index, layer in enumerate(self._layers):
            layer.kept = index >= recomputed
        batch = self._batch(size)
        torch.cuda.reset_peak_memory_stats()
        if captured:
            return self._measure_captured(batch, runs)
        self._step(batch)
        seconds, of_host = _timed(lambda: self._step(batch), runs)
        return Measurement(seconds, torch.cuda.max_memory_allocated() / GIB, of_host)

    def _measure_captured(self, batch: dict[str, Any], runs: int) -> Measurement:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients, device = FlatGradients(trained), trained[0].device
        tokens = batch["input_ids"].shape[1]
        passes = CapturedPasses(filled(tokens), self._workspace, device)
        learned = torch.tensor(tokens, device=device)
        for layer in self._layers:
            layer.train_through(gradients.leaves)

        def compute(inputs: dict[str, Any], learned: torch.Tensor) -> Result:
            outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            loss = -outputs.log_probs.sum() / learned
            loss.backward()
            return Result(loss.detach(), outputs.label_mask.sum())

        def step() -> None:
            gradients.begin()
            passes.run(batch, learned, compute)

        try:
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            step()  # captures
            assert passes.most_tokens, "not captured"
            held = torch.cuda.memory_reserved() - before
            seconds, of_host = _timed(step, runs)
        finally:
            for layer in self._layers:
                layer.train_through({parameter: parameter for parameter in trained})
            passes.forget()
        return Measurement(seconds, (peak + held) / GIB, of_host)

    def load(self, batch: int) -> Load:
        lengths = _lengths(LENGTH)
        return Load.of(Counter(lengths), batch // LENGTH, -(-sum(lengths) // LENGTH), LENGTH)

    def profile(self, tokens: int) -> str:
        from torch.profiler import ProfilerActivity, profile

        batch = self._batch(Pass(LENGTH, tokens))
        self._step(batch)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self._step(batch)
            torch.cuda.synchronize()
        events = [event for event in found.key_averages() if event.self_device_time_total]
        total = sum(event.self_device_time_total for event in events)
        lines = [f"{total / 1000:.1f} ms on the GPU"]
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:26]:
            lines.append(f"{event.self_device_time_total / 1000:8.2f} ms {event.count:5} × {event.key[:110]}")
        return "\n".join(lines)

    def _batch(self, size: Pass) -> dict[str, Any]:
        tokens, lengths = size.tokens, list(_fill(_lengths(size.length), size.tokens))
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
        ids = torch.randint(
            3, self.shape.decoder.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens)
        ).cuda()
        positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
        return {
            "input_ids": ids, "labels": ids, "position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
            "max_length_q": max(lengths), "max_length_k": max(lengths),
        }  # fmt: skip

    def _step(self, batch: dict[str, Any]) -> None:
        self.model(**batch, fused_lm_head=True).loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None


def _timed(step: Callable[[], None], runs: int) -> tuple[float, float]:
    """The median seconds of `step`, and of launching it."""
    torch.cuda.synchronize()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        step()
        asked = time.perf_counter()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began, asked - began))
    seconds, of_host = map(statistics.median, zip(*times, strict=True))
    return seconds, of_host


def _lengths(longest: int) -> list[int]:
    chance, times = random.Random(0), max(1.0, longest / LENGTH)
    return [min(longest - 2, max(16, int(times * chance.lognormvariate(5.9, 0.8)))) for _ in range(2000)]


def _fill(lengths: list[int], tokens: int) -> Iterator[int]:
    for length in lengths:
        taken = min(length, tokens)
        tokens -= taken
        if taken:
            yield taken


def _load(folder: Path, settings: Settings, decoder: Decoder) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation=register_varlen(),
        quantization_config=four_bit_config(settings, torch.bfloat16),
    )  # fmt: skip
    model = get_peft_model(
        base, LoraConfig(
            r=settings.lora_r, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM",
            target_modules=list(decoder.architecture.linear),
        )
    )  # fmt: skip
    hold_adapter_in_float32(model)
    fuse_head(model, decoder, Patches())
    return model.train()


Measured = dict[tuple[Weights, int, Pass], Measurement]


def _between(measured: Measured, weights: Weights, recomputed: int, tokens: Pass) -> tuple[float, float] | None:
    """Interpolate the seconds and GiB of a plan between two measured ones."""
    known = sorted(r for w, r, t in measured if (w, t) == (weights, tokens))
    below, above = (
        max((r for r in known if r <= recomputed), default=None), min((r for r in known if r >= recomputed), default=None)
    )  # fmt: skip
    if below is None or above is None:
        return None
    one, two = measured[weights, below, tokens], measured[weights, above, tokens]
    part = (recomputed - below) / max(1, above - below)
    return one.seconds + (two.seconds - one.seconds) * part, one.gib + (two.gib - one.gib) * part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Llama")
    parser.add_argument(
        "--tokens", type=Pass.named, nargs="+", default=[Pass(LENGTH, tokens) for tokens in (2048, 4096, 8192, 16384, 32768)],
        help="tokens at once, in rows of 2,048, or LENGTH:TOKENS",
    )  # fmt: skip
    parser.add_argument("--caps", type=float, nargs="*", default=[8, 16, 40], help="GiB")
    parser.add_argument(
        "--weights", nargs="+", default=["4-bit", "resident"], help="any of 4-bit, resident, fp8, in that order"
    )
    parser.add_argument(
        "--profile", type=int, default=0, help="profile a step of this many tokens, with the last weights"
    )
    options = parser.parse_args()
    bench = Bench(options.model)
    batch = max((size.tokens for size in options.tokens if size.length == LENGTH), default=LENGTH)
    candidates = list(plans(bench.shape, bench.load(batch), bench.card, bench.settings))
    choices = {cap: choose(candidates, cap * GIB) for cap in options.caps}
    measured: Measured = {}
    contenders: defaultdict[float, list[Contender]] = defaultdict(list)
    print(
        "| weights, layers recomputed | rows, tokens at once | ms | host ms | tokens/s | peak GiB | predicted ms, GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for weights in options.weights:
        bench.take(weights)
        for size in options.tokens:
            for recomputed in (0, bench.shape.layers // 2, bench.shape.layers):
                _measure_one(bench, measured, weights, recomputed, size)
        for cap, choice in choices.items():
            contenders[cap] += _in_turns(bench, weights, choice, _fastest(measured, weights, cap, bench.shape.layers))
    print("\n| cap | planner's choice | tokens/s | GiB | fastest other plan | tokens/s | GiB | choice / other |")
    print("|---|---|---|---|---|---|---|---|")
    for cap, found in contenders.items():
        _print_contest(cap, found)
    if options.profile:
        bench.measure(0, options.profile)
        print(bench.profile(options.profile))
    return 0


def _measure_one(bench: Bench, measured: Measured, weights: Weights, recomputed: int, size: Pass) -> None:
    tokens, lengths = size.tokens, list(_fill(_lengths(size.length), size.tokens))
    load = Load.one(tokens, sum(length**2 for length in lengths) / tokens)
    plan = Plan(weights, recomputed, tokens, 1, longest_row=max(lengths))
    captured = tokens <= worth_capturing(bench.shape, plan, load, bench.card)
    if captured:
        plan = replace(plan, captured_tokens=filled(tokens))
    try:
        found = measured[weights, recomputed, size] = bench.measure(recomputed, size, captured=captured)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return
    expected = predicted_seconds(bench.shape, plan, load, bench.card)
    memory = predicted_bytes(bench.shape, plan, bench.settings, bench.card) / GIB
    print(f"| {weights}, {recomputed}{', captured' if captured else ''} | {size.length:,}, {tokens:,} "
          f"| {found.seconds * 1e3:.1f} | {found.of_host * 1e3:.1f} | {tokens / found.seconds:,.0f} | {found.gib:.2f} "
          f"| {expected * 1e3:.0f}, {memory:.2f} |", flush=True)  # fmt: skip


def _fastest(measured: Measured, weights: Weights, cap: float, layers: int) -> tuple[int, Pass] | None:
    """Layers recomputed and tokens at once of the fastest plan that fits, by the measurements."""
    found = []
    for size in {size for of, _, size in measured if of == weights and size.length == LENGTH}:
        for recomputed in range(layers + 1):
            between = _between(measured, weights, recomputed, size)
            if between is not None and between[1] + CONTEXT_GIB <= cap:
                found.append((between[0] / size.tokens, recomputed, size))
    return min(found)[1:] if found else None


class Contender(NamedTuple):
    name: str
    tokens_per_second: float
    gib: float
    is_choice: bool


def _in_turns(
    bench: Bench, weights: Weights, choice: Plan, fastest: tuple[int, Pass] | None, rounds: int = 3
) -> list[Contender]:
    """Measure the planner's choice, if it has these weights, and the search's, alternating.

    A host or card that slows down then does so for both.
    """
    chosen = (choice.recomputed, Pass(LENGTH, choice.micro_batch_tokens)) if choice.weights == weights else None
    contending = list(dict.fromkeys(plan for plan in (chosen, fastest) if plan is not None))
    most = choice.captured_tokens
    found = [
        [bench.measure(recomputed, size, captured=size.tokens <= most) for recomputed, size in contending]
        for _ in range(rounds)
    ]
    return [
        Contender(
            f"{weights}, {recomputed} recomputed, {size.tokens:,} tokens",
            size.tokens / statistics.median(measurement.seconds for measurement in of_plan),
            max(measurement.gib for measurement in of_plan),
            (recomputed, size) == chosen,
        )
        for (recomputed, size), of_plan in zip(contending, zip(*found, strict=True), strict=True)
    ]


def _print_contest(cap: float, contenders: list[Contender]) -> None:
    choice = next((one for one in contenders if one.is_choice), None)
    if choice is None:
        print(f"| {cap:g} GiB | its weights were not measured | | | | | | |", flush=True)
        return
    others = [one for one in contenders if not one.is_choice]
    best = max(others, key=lambda one: one.tokens_per_second) if others else choice
    shown = (f"{one.name} | {one.tokens_per_second:,.0f} | {one.gib:.1f}" for one in (choice, best))
    ratio = choice.tokens_per_second / best.tokens_per_second
    print(f"| {cap:g} GiB | {' | '.join(shown)} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
