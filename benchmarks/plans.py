"""The planner against measurements on this GPU: `python -m benchmarks.plans --model FOLDER`.

A forward and backward pass of every kind of plan is timed, without an optimizer; what lies between the measured numbers of
recomputed layers is interpolated, as time and memory grow by each layer alike. For each cap on memory the planner's choice
is then measured too, and compared with the fastest plan that fits by these measurements.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from job.model.attention import register_varlen
from job.model.fused.head import fuse_head
from job.model.fused.layer import FusedLayer, Weights, fuse_layers
from job.model.quantization import four_bit_config
from job.settings import Settings
from job.training.cards import GIB, Card, card_named
from job.training.planner import Plan, choose, plans, predicted_bytes, predicted_seconds
from job.training.workload import Load, Shape

LENGTH = 2048
CONTEXT_GIB = 0.6  # what CUDA itself takes of a card


class Bench:
    """The model in the form that was asked for last, and documents of guanaco's lengths for it."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(lora_target_modules="all-linear", lora_dropout=0, packing=True)
        shape = Shape.of(json.loads((folder / "config.json").read_text(encoding="utf-8")), self.settings)
        card = card_named(torch.cuda.get_device_name())
        assert shape is not None and card is not None, "a Llama, and a card that the planner knows"
        self.shape: Shape = shape
        self.card: Card = card
        chance = random.Random(0)
        self._lengths = [min(LENGTH - 2, max(16, int(chance.lognormvariate(5.9, 0.8)))) for _ in range(2000)]
        self.model = _load(folder, self.settings)
        self._layers: list[FusedLayer] = []

    def take(self, weights: Weights) -> None:
        self._layers = fuse_layers(self.model, weights)
        gc.collect()  # the weights of the form before
        torch.cuda.empty_cache()

    def measure(self, recomputed: int, tokens: int, runs: int = 3) -> tuple[float, float]:
        """Seconds, and GiB at most."""
        for index, layer in enumerate(self._layers):
            layer.kept = index >= recomputed
        batch = self._batch(tokens)
        self._step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(runs):
            began = time.perf_counter()
            self._step(batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds), torch.cuda.max_memory_allocated() / GIB

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
        ids = torch.randint(3, 32000, (1, tokens), generator=torch.Generator().manual_seed(tokens)).cuda()
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


def _load(folder: Path, settings: Settings) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation=register_varlen(),
        quantization_config=four_bit_config(settings, torch.bfloat16),
    )  # fmt: skip
    model = get_peft_model(
        base, LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    fuse_head(model)
    return model.train()


Measured = dict[tuple[str, int, int], tuple[float, float]]


def _between(measured: Measured, weights: str, recomputed: int, tokens: int, layers: int) -> tuple[float, float] | None:
    """Seconds and GiB of a plan that lies between two measured ones."""
    known = sorted(r for w, r, t in measured if (w, t) == (weights, tokens))
    below, above = (
        max((r for r in known if r <= recomputed), default=None), min((r for r in known if r >= recomputed), default=None)
    )  # fmt: skip
    if below is None or above is None:
        return None
    one, two = measured[weights, below, tokens], measured[weights, above, tokens]
    part = (recomputed - below) / max(1, above - below)
    seconds, gib = (a + (b - a) * part for a, b in zip(one, two, strict=True))
    return seconds, gib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a Llama")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--caps", type=float, nargs="*", default=[8, 16, 40], help="GiB")
    parser.add_argument(
        "--weights", nargs="+", default=["4-bit", "resident"], help="of 4-bit, resident, fp8; in that order"
    )
    parser.add_argument("--profile", type=int, default=0, help="tokens of a step to profile, with the last weights")
    options = parser.parse_args()
    bench = Bench(options.model)
    layers, batch = bench.shape.layers, max(options.tokens)
    load = bench.load(batch)
    wanted = {
        cap: choose(list(plans(bench.shape, load, bench.card, bench.settings)), cap * GIB) for cap in options.caps
    }
    measured: Measured = {}
    chosen: dict[float, tuple[float, float]] = {}
    print(
        "| weights, layers recomputed | tokens at once | ms | tokens/s | peak GiB | predicted ms, GiB |\n|---|---|---|---|---|---|"
    )
    for weights in options.weights:
        bench.take(weights)
        for tokens in options.tokens:
            for recomputed in (0, layers // 2, layers):
                _measure_one(bench, measured, weights, recomputed, tokens)
        for cap, plan in wanted.items():
            if plan.weights == weights:
                seconds, gib = bench.measure(plan.recomputed, plan.micro_batch_tokens)
                chosen[cap] = seconds * batch / plan.micro_batch_tokens, gib
    print(
        "\n| cap | the planner's choice | tokens/s | GiB | the best by search | tokens/s | choice to best |\n|---|---|---|---|---|---|---|"
    )
    for cap, (seconds, gib) in chosen.items():
        best, name = min(_search(measured, batch, cap, layers))
        plan = wanted[cap]
        print(f"| {cap:g} GiB | {plan.described(layers)} | {batch / seconds:,.0f} | {gib:.1f} | {name} | {batch / best:,.0f} "
              f"| {best / seconds:.3f} |", flush=True)  # fmt: skip
    if options.profile:
        bench.measure(0, options.profile)
        print(bench.profile(options.profile))
    return 0


def _measure_one(bench: Bench, measured: Measured, weights: Weights, recomputed: int, tokens: int) -> None:
    try:
        seconds, gib = measured[weights, recomputed, tokens] = bench.measure(recomputed, tokens)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return
    plan = Plan(weights, recomputed, tokens, 1)
    context = sum(length**2 for length in _fill(bench._lengths, tokens)) / tokens
    expected = predicted_seconds(bench.shape, plan, Load.one(tokens, context), bench.card)
    memory = predicted_bytes(bench.shape, plan, bench.settings) / GIB
    print(f"| {weights}, {recomputed} | {tokens:,} | {seconds * 1e3:.1f} | {tokens / seconds:,.0f} | {gib:.2f} "
          f"| {expected * 1e3:.0f}, {memory:.2f} |", flush=True)  # fmt: skip


def _search(measured: Measured, batch: int, cap: float, layers: int) -> Iterator[tuple[float, str]]:
    """Seconds of the whole batch, and a name, of all plans that fit by what was measured."""
    for weights in {weights for weights, _, _ in measured}:
        for tokens in {tokens for _, _, tokens in measured}:
            for recomputed in range(layers + 1):
                found = _between(measured, weights, recomputed, tokens, layers)
                if found is not None and found[1] + CONTEXT_GIB <= cap:
                    yield found[0] * batch / tokens, f"{weights}, {recomputed} recomputed, {tokens:,} tokens"


if __name__ == "__main__":
    sys.exit(main())
