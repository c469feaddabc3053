"""Compare the planner with measurements on this GPU: `python -m benchmarks.plans --model FOLDER`.

It times a forward and backward pass of every kind of plan, without an optimizer. Plans between the measured numbers of
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
from collections.abc import Iterator
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
from job.training.plan.candidates import Plan, plans, predicted_bytes, predicted_seconds
from job.training.plan.cards import GIB, Card, card_named
from job.training.plan.choose import choose
from job.training.plan.load import Load, Shape

LENGTH = 2048
CONTEXT_GIB = 0.6  # what CUDA itself uses on a card


class Measurement(NamedTuple):
    """Seconds of a forward and backward pass, its peak in GiB, and the seconds that the host took to launch it."""

    seconds: float
    gib: float
    of_host: float


class Bench:
    """The model with the weights that were last requested, and documents with guanaco's lengths."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(lora_target_modules="all-linear", lora_dropout=0, packing=True)
        self.shape = Shape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")), self.settings)
        card = card_named(torch.cuda.get_device_name())
        assert card is not None, "needs a card that the planner knows"
        self.card: Card = card
        chance = random.Random(0)
        self._lengths = [min(LENGTH - 2, max(16, int(chance.lognormvariate(5.9, 0.8)))) for _ in range(2000)]
        self.model = _load(folder, self.settings, self.shape.decoder)
        self._layers: list[FusedLayer] = []
        self._patches = Patches()
        self._patches.settle_weights()  # two copies of a 7B would not fit

    def take(self, weights: Weights) -> None:
        decoder, workspace = self.shape.decoder, Workspace(self._patches)
        self._layers = [
            fuse_layer(self.model, index, decoder, weights, workspace, self._patches) for index in range(decoder.layers)
        ]
        gc.collect()  # frees the previous weights
        torch.cuda.empty_cache()

    def measure(self, recomputed: int, tokens: int, runs: int = 3) -> Measurement:
        for index, layer in enumerate(self._layers):
            layer.kept = index >= recomputed
        batch = self._batch(tokens)
        self._step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            self._step(batch)
            asked = time.perf_counter()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began, asked - began))
        seconds, of_host = map(statistics.median, zip(*times, strict=True))
        return Measurement(seconds, torch.cuda.max_memory_allocated() / GIB, of_host)

    def load(self, batch: int) -> Load:
        return Load.of(Counter(self._lengths), batch // LENGTH, -(-sum(self._lengths) // LENGTH), LENGTH)

    def profile(self, tokens: int) -> str:
        from torch.profiler import ProfilerActivity, profile

        batch = self._batch(tokens)
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

    def _batch(self, tokens: int) -> dict[str, Any]:
        lengths = list(_fill(self._lengths, tokens))
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


Measured = dict[tuple[Weights, int, int], Measurement]


def _between(measured: Measured, weights: Weights, recomputed: int, tokens: int) -> tuple[float, float] | None:
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--caps", type=float, nargs="*", default=[8, 16, 40], help="GiB")
    parser.add_argument(
        "--weights", nargs="+", default=["4-bit", "resident"], help="any of 4-bit, resident, fp8, in that order"
    )
    parser.add_argument(
        "--profile", type=int, default=0, help="profile a step of this many tokens, with the last weights"
    )
    options = parser.parse_args()
    bench = Bench(options.model)
    batch = max(options.tokens)
    candidates = list(plans(bench.shape, bench.load(batch), bench.card, bench.settings))
    choices = {cap: choose(candidates, cap * GIB) for cap in options.caps}
    measured: Measured = {}
    contenders: defaultdict[float, list[Contender]] = defaultdict(list)
    print("| weights, layers recomputed | tokens at once | ms | host ms | tokens/s | peak GiB | predicted ms, GiB |")
    print("|---|---|---|---|---|---|---|")
    for weights in options.weights:
        bench.take(weights)
        for tokens in options.tokens:
            for recomputed in (0, bench.shape.layers // 2, bench.shape.layers):
                _measure_one(bench, measured, weights, recomputed, tokens)
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


def _measure_one(bench: Bench, measured: Measured, weights: Weights, recomputed: int, tokens: int) -> None:
    try:
        found = measured[weights, recomputed, tokens] = bench.measure(recomputed, tokens)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return
    plan = Plan(weights, recomputed, tokens, 1)
    context = sum(length**2 for length in _fill(bench._lengths, tokens)) / tokens
    expected = predicted_seconds(bench.shape, plan, Load.one(tokens, context), bench.card)
    memory = predicted_bytes(bench.shape, plan, bench.settings, bench.card) / GIB
    print(f"| {weights}, {recomputed} | {tokens:,} | {found.seconds * 1e3:.1f} | {found.of_host * 1e3:.1f} "
          f"| {tokens / found.seconds:,.0f} | {found.gib:.2f} | {expected * 1e3:.0f}, {memory:.2f} |", flush=True)  # fmt: skip


def _fastest(measured: Measured, weights: Weights, cap: float, layers: int) -> tuple[int, int] | None:
    """Layers recomputed and tokens at once of the fastest plan that fits, by the measurements."""
    found = []
    for tokens in {tokens for of, _, tokens in measured if of == weights}:
        for recomputed in range(layers + 1):
            between = _between(measured, weights, recomputed, tokens)
            if between is not None and between[1] + CONTEXT_GIB <= cap:
                found.append((between[0] / tokens, recomputed, tokens))
    return min(found)[1:] if found else None


class Contender(NamedTuple):
    name: str
    tokens_per_second: float
    gib: float
    is_choice: bool


def _in_turns(
    bench: Bench, weights: Weights, choice: Plan, fastest: tuple[int, int] | None, rounds: int = 3
) -> list[Contender]:
    """Measure the planner's choice, if it has these weights, and the search's, alternating.

    A host or card that slows down then does so for both.
    """
    chosen = (choice.recomputed, choice.micro_batch_tokens) if choice.weights == weights else None
    contending = list(dict.fromkeys(plan for plan in (chosen, fastest) if plan is not None))
    found = [[bench.measure(*plan) for plan in contending] for _ in range(rounds)]
    return [
        Contender(
            f"{weights}, {recomputed} recomputed, {tokens:,} tokens",
            tokens / statistics.median(measurement.seconds for measurement in of_plan),
            max(measurement.gib for measurement in of_plan),
            (recomputed, tokens) == chosen,
        )
        for (recomputed, tokens), of_plan in zip(contending, zip(*found, strict=True), strict=True)
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
