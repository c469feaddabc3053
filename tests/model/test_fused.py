"""The fast versions of the training step give the plain one's numbers, per token and for every gradient."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from job.model.adapters import lora_config
from job.model.attention import register_varlen
from job.model.compilation import compile_layers
from job.model.fused import pointwise
from job.model.fused.head import LastNorm, _LabelLogProbs, fuse_head
from job.model.fused.layer import LINEAR_LAYERS, Weights
from job.model.fused.products import Products
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from job.model.quantization import make_resident
from tests.conftest import load_model, unavailable
from tests.model.families import decoder_of, fuse

# ranks for which two layers with the same input have their adapters on either side of it, or both after it
TARGETS = [("all-linear", 8), ("all-linear", 4), ("q_proj, v_proj", 8), ("down_proj, k_proj, up_proj", 8)]
LENGTHS = (7, 19, 1, 12)


@dataclass(frozen=True)
class Step:
    """The result of one forward and backward pass."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


Build = Callable[..., PeftModel]


@pytest.fixture
def build(make_run_with_model: Callable[..., Any]) -> Build:
    """The tiny model with an adapter whose matrices are both nonzero. The weights are the same each time."""
    made: list[Any] = []

    def make(
        targets: str = "all-linear", rank: int = 8, *, quantized: bool = True, attention: str | None = None
    ) -> PeftModel:
        if not made:
            made.append(make_run_with_model(LORA_R=str(rank), LORA_DROPOUT="0", LORA_TARGET_MODULES=targets))
        run = made[0]
        model = get_peft_model(load_model(run, quantized=quantized, attention=attention), lora_config(run.settings))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = (noise * (0.1 if "lora_B" in name else 0.3)).float()
        return model.train()

    return make


def padded(model: PeftModel) -> Step:
    """The rows as a batch with padding, computed by transformers and peft themselves."""
    rows = _rows()
    longest = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    return _step(model, [logits[index, : len(row)] for index, row in enumerate(rows)])


def padding_free(model: PeftModel, lengths: tuple[int, ...] = LENGTHS) -> Step:
    """The rows one after the other."""
    rows = _rows()
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    logits = model(
        input_ids=torch.cat(rows).unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits[0]
    return _step(model, list(logits.split(lengths)))


def _rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 512, (length,), generator=generator) for length in LENGTHS]


def _step(model: PeftModel, logits: list[torch.Tensor]) -> Step:
    pairs = zip(logits, _rows(), strict=True)
    losses = torch.cat([torch.nn.functional.cross_entropy(row[:-1], ids[1:], reduction="none") for row, ids in pairs])
    model.zero_grad()
    losses.mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return Step(losses.detach(), gradients)


def assert_same(step: Step, other: Step, relative: float = 1e-5) -> None:
    torch.testing.assert_close(step.losses, other.losses, rtol=relative, atol=1e-6)
    assert step.gradients.keys() == other.gradients.keys()
    for name, gradient in step.gradients.items():
        difference = float((gradient - other.gradients[name]).norm() / gradient.norm())
        assert difference < relative, f"{name}: {difference}"


@pytest.mark.parametrize(("targets", "rank"), TARGETS)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("weights", ["resident", "4-bit"])
def test_a_fused_layer_gives_the_losses_and_gradients_of_the_padded_batch(
    build: Build, targets: str, rank: int, kept: bool, weights: Weights
) -> None:
    plain = padded(build(targets, rank))
    model = build(targets, rank, attention=register_varlen())
    for layer in fuse(model, weights):
        layer.kept = kept
    assert_same(padding_free(model), plain)


def test_compiled_layers_give_the_losses_and_gradients_of_plain_ones(build: Build) -> None:
    if shutil.which("g++") is None:
        unavailable("torch.compile needs g++ (make system-packages)")
    plain, model = padding_free(build(attention=register_varlen())), build(attention=register_varlen())
    compile_layers(model)
    torch._dynamo.reset()
    assert_same(padding_free(model), plain)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.parametrize("kept", [True, False])
def test_8_bit_products_change_losses_and_gradients_only_by_their_rounding(kept: bool) -> None:
    """Uses a freshly initialised model, because the tiny model's sharp attention amplifies any rounding."""

    def calm() -> PeftModel:
        config = LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            attn_implementation=register_varlen(),
        )  # fmt: skip
        torch.manual_seed(0)
        base = LlamaForCausalLM(config)
        base.requires_grad_(False)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.train()

    exact, model = padding_free(calm()), calm()
    for layer in fuse(model, "fp8"):
        layer.kept = kept
    rounded = padding_free(model)
    assert not torch.equal(rounded.losses, exact.losses)
    torch.testing.assert_close(rounded.losses, exact.losses, rtol=0.02, atol=0.02)
    for name, gradient in exact.gradients.items():
        difference = float((gradient - rounded.gradients[name]).norm() / gradient.norm())
        assert difference < 0.25, f"{name}: {difference}"


def dropped_by_hand(model: PeftModel) -> Step:
    """The rows one after the other through peft's own layers, with the same dropout as the fused layers."""
    for index, layer in enumerate(model.get_base_model().base_model.layers):
        names = (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
        for place, name in enumerate(names):
            wrapper = layer.get_submodule(name)
            wrapper.lora_dropout["default"] = _Seeded(0.25, index * LINEAR_LAYERS + place)
    return padding_free(model)


class _Seeded(torch.nn.Dropout):
    def __init__(self, probability: float, seed: int) -> None:
        super().__init__(probability)
        self.seed = seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, -2)
        return (flat * (pointwise.dropout_(torch.ones_like(flat), self.p, self.seed))).view_as(x)


@pytest.mark.parametrize("weights", ["resident", "4-bit", "fp8"])
@pytest.mark.parametrize("kept", [True, False])
def test_dropout_in_a_fused_layer_gives_the_gradients_of_the_same_dropout_in_peft(
    build: Build, kept: bool, weights: Weights
) -> None:
    wanted = dropped_by_hand(build(attention=register_varlen()))
    model = build(attention=register_varlen())
    for wrapper in model.modules():
        if isinstance(wrapper, LoraLayer):
            wrapper.lora_dropout["default"] = torch.nn.Dropout(0.25)
    for index, layer in enumerate(fuse(model, weights)):
        layer.kept, layer.dropout_seed = kept, index * LINEAR_LAYERS
    found = padding_free(model)
    if weights != "fp8":
        assert_same(found, wanted, 1e-4)
    else:
        assert float((found.losses - wanted.losses).norm() / wanted.losses.norm()) < 0.1
    assert not torch.equal(padding_free(model.eval()).losses, found.losses)


def test_rows_without_padding_give_the_losses_and_gradients_of_the_padded_batch(build: Build) -> None:
    assert_same(padding_free(build(attention=register_varlen())), padded(build()))


def test_dequantized_weights_give_exactly_the_numbers_of_4_bit_ones(build: Build) -> None:
    four_bit, resident = build(), build()
    make_resident(resident, Patches())
    assert not [m for m in resident.modules() if type(m).__name__ == "Params4bit"]
    with torch.no_grad():
        ids = _rows()[1].unsqueeze(0)
        assert torch.equal(resident(input_ids=ids).logits, four_bit(input_ids=ids).logits)
    fused = {}
    kind: Weights
    for kind in ("resident", "4-bit"):
        model = build(attention=register_varlen())
        fuse(model, kind)
        fused[kind] = padding_free(model)
    assert torch.equal(fused["resident"].losses, fused["4-bit"].losses)
    assert all(
        torch.equal(value, fused["4-bit"].gradients[name]) for name, value in fused["resident"].gradients.items()
    )


class Unseen(torch.optim.Optimizer):
    """Changes parameters as bitsandbytes' kernels do, without changing their version counters."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(-0.5)


def test_dequantized_layers_notice_every_change_to_their_adapters(build: Build) -> None:
    def changed(model: PeftModel, how: str) -> Step:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if how == "optimizer":
            versions = [parameter._version for parameter in trained]
            Unseen(trained, {}).step()
            assert versions == [parameter._version for parameter in trained]
        else:  # as when a checkpoint is loaded
            with torch.no_grad():
                for parameter in trained:
                    parameter.copy_(parameter * -0.5)
        return padding_free(model)

    for how in ("optimizer", "checkpoint"):
        model = build(attention=register_varlen())
        fuse(model, "resident")
        before = padding_free(model)
        after = changed(model, how)
        assert not torch.equal(before.losses, after.losses)
        assert_same(after, changed(build(attention=register_varlen()), how))


def test_what_a_small_adapter_adds_in_16_bits_is_not_rounded_away_as_in_peft() -> None:
    """In the first steps, what B adds is less than half a unit in the last place of what it is added to."""

    def layer(size: float) -> LoraLayer:
        torch.manual_seed(0)
        base = torch.nn.Linear(256, 256, bias=False)
        torch.nn.init.normal_(base.weight, std=1 / 16)
        wrapped = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=16, lora_alpha=16, target_modules=["0"]))
        found: LoraLayer = wrapped.base_model.model[0].bfloat16()
        torch.nn.init.normal_(found.lora_B["default"].weight, std=size)
        return found

    x = torch.randn(2048, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    small, none = layer(3e-4), layer(0)
    wanted = x.double() @ small.lora_A["default"].weight.double().T @ small.lora_B["default"].weight.double().T

    def fused(one: LoraLayer) -> torch.Tensor:
        products = Products([one], Workspace(Patches()), Patches())
        wide = products.new_input(x)
        products.inner(wide).copy_(x)
        return products.forward_(wide, [(0, 0)])[0]

    def part_left(y: torch.Tensor, without: torch.Tensor) -> float:
        return float(((y.double() - without.double()) * wanted).sum() / wanted.square().sum())

    with torch.no_grad():
        assert abs(part_left(fused(small), fused(none)) - 1) < 0.03
        assert part_left(small(x), none(x)) < 0.75


@pytest.mark.parametrize("fused", [True, False])
def test_no_token_sees_another_row_or_a_later_token(build: Build, fused: bool) -> None:
    """Checked by the gradient of each token's output with respect to every token's embedding."""
    model = build(attention=register_varlen())
    if fused:
        fuse(model, "4-bit")
    rows, total = _rows(), sum(LENGTHS)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    embedded = model.get_input_embeddings()(torch.cat(rows)).detach().unsqueeze(0).requires_grad_()
    out = model.get_base_model().base_model(
        inputs_embeds=embedded,
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        cu_seq_lens_q=boundaries,
        max_length_q=max(LENGTHS),
    )
    states = out.last_hidden_state[0]
    row_of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    for token in range(total):
        (seen,) = torch.autograd.grad(states[token].square().sum(), embedded, retain_graph=True)
        sees = seen[0].abs().sum(-1) > 0
        may = (row_of == row_of[token]) & (torch.arange(total) <= token)
        assert torch.equal(sees, may), token


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("ignored", [[], [0, 5, 8], list(range(9))])
def test_the_fused_head_gives_the_loss_and_gradient_of_the_logits(ignored: list[int], every_token: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(9, 16, generator=generator, requires_grad=True)
    weight, norm = torch.randn(40, 16, generator=generator), torch.randn(16, generator=generator)
    labels = torch.randint(0, 40, (9,), generator=generator)
    labels[ignored] = -100
    learned = labels != -100
    log_p = torch.log_softmax(torch.nn.functional.rms_norm(states, (16,), norm, 1e-5) @ weight.T, -1)
    chosen = log_p.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) * learned
    scales = torch.linspace(0.1, 2, 9)
    (wanted,) = torch.autograd.grad((chosen * scales).sum(), states)

    found, entropy, first = _LabelLogProbs.apply(states, LastNorm(norm, 1e-5), weight, labels, every_token)
    (gradient,) = torch.autograd.grad((found * scales).sum(), states)
    torch.testing.assert_close(found, chosen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1) * learned, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, (log_p.argmax(-1) == labels) & learned)


def test_a_model_with_a_fused_head_gives_trl_what_the_plain_model_gives(build: Build) -> None:
    model = build(attention=register_varlen())
    rows = _rows()
    labels = torch.cat(rows).unsqueeze(0).clone()
    labels[
        0, [*torch.tensor([0, *LENGTHS[:-1]]).cumsum(0).tolist(), 3]
    ] = -100  # the first token of a row is never predicted
    inputs = {
        "input_ids": torch.cat(rows).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
        "cu_seq_lens_q": torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32),
        "max_length_q": max(LENGTHS),
    }
    logits = model(**inputs).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
    fuse_head(model, decoder_of(model.config), Patches())
    found = model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(-found.log_probs[0], losses, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.label_mask, labels[:, 1:] != -100)
    assert torch.equal(found.is_top1[0], (logits.argmax(-1) == labels[0, 1:]))
    torch.testing.assert_close(found.loss, losses.sum() / found.label_mask.sum())
    assert torch.equal(model(**inputs).logits[0, :-1], logits), "the norm is back in its place"
