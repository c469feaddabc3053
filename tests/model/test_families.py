"""The fused layers give transformers' and peft's numbers for every described architecture, in float32 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig

from job.model.architectures import ARCHITECTURES, Decoder, NotDescribed, default_targets
from job.model.attention import register_varlen
from job.model.fused.head import fuse_head
from job.model.fused.layer import Weights
from job.model.patches import Patches
from tests.model.families import FAMILIES, Family, adapted, as_json, base_model, decoder_of, fuse

LENGTHS = (9, 23, 1, 14)


@dataclass(frozen=True)
class Step:
    """The loss of each token, and the gradient of every adapter."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


def rows(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in LENGTHS]


def padded(model: PeftModel) -> Step:
    """Computed by transformers and peft, as a batch with padding."""
    found = rows(model.config.vocab_size)
    longest = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in found])
    mask = torch.stack([torch.arange(longest) < len(row) for row in found]).long()
    logits = model(input_ids=ids, attention_mask=mask).logits
    return step(model, [logits[index, : len(row)] for index, row in enumerate(found)])


def in_one_sequence(model: PeftModel) -> dict[str, torch.Tensor | int]:
    found = rows(model.config.vocab_size)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(found).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0),
        "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries,
        "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
    }  # fmt: skip


def padding_free(model: PeftModel) -> Step:
    logits = model(**in_one_sequence(model), use_cache=False).logits[0]
    return step(model, list(logits.split(LENGTHS)))


def step(model: PeftModel, logits: list[torch.Tensor]) -> Step:
    pairs = zip(logits, rows(model.config.vocab_size), strict=True)
    losses = torch.cat([torch.nn.functional.cross_entropy(row[:-1], ids[1:], reduction="none") for row, ids in pairs])
    model.zero_grad()
    losses.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return Step(losses.detach(), gradients)


def assert_same(found: Step, wanted: Step, relative: float = 1e-5) -> None:
    torch.testing.assert_close(found.losses, wanted.losses, rtol=relative, atol=2e-6)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        difference = float((gradient - found.gradients[name]).norm() / gradient.norm())
        assert difference < relative, f"{name}: {difference}"


def fused(family: Family, weights: Weights = "resident", *, kept: bool = True, rank: int = 8) -> PeftModel:
    model = adapted(base_model(family.config(), attention=register_varlen()), rank)
    for layer in fuse(model, weights):
        layer.kept = kept
    return model


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_a_fused_layer_of_each_family_gives_the_losses_and_gradients_of_the_padded_batch(
    family: Family, kept: bool
) -> None:
    wanted = padded(adapted(base_model(family.config(), attention="eager")))
    assert_same(padding_free(fused(family, kept=kept)), wanted, 2e-5 if "gemma" in family.name else 1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_plain_layers_of_each_family_give_the_same_without_padding(family: Family) -> None:
    wanted = padded(adapted(base_model(family.config(), attention="eager")))
    assert_same(padding_free(adapted(base_model(family.config(), attention=register_varlen()))), wanted, 2e-5)


@pytest.mark.parametrize("rank", [1, 4, 6, 12])
def test_ranks_that_are_no_multiples_of_8_give_the_same_gradients(rank: int) -> None:
    for family in (FAMILIES[0], next(one for one in FAMILIES if one.name == "phi 3")):
        wanted = padded(adapted(base_model(family.config(), attention="eager"), rank))
        for kept in (True, False):
            assert_same(padding_free(fused(family, kept=kept, rank=rank)), wanted)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_the_fused_head_of_each_family_gives_the_losses_of_its_logits(family: Family) -> None:
    """101 tokens of vocabulary: an odd number, whose rows of logits start at any address."""
    model = adapted(base_model(family.config(), attention=register_varlen()))
    inputs = in_one_sequence(model)
    labels = inputs["input_ids"].clone()  # type: ignore[union-attr]
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0).tolist()
    labels[0, [*starts, 3]] = -100
    logits = model(**inputs, use_cache=False).logits[0, :-1]
    wanted = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    model.zero_grad()
    wanted.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    fuse_head(model, decoder_of(model.config), Patches())
    found = -model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model.zero_grad()
    found.backward()
    for parameter, gradient in zip((one for one in model.parameters() if one.requires_grad), gradients, strict=True):
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 2e-5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_windows_and_positions_of_each_layer_are_transformers_own(family: Family) -> None:
    model = base_model(family.config(), attention="eager")
    decoder = decoder_of(model.config)
    for index, layer in enumerate(model.base_model.layers):
        attention = layer.self_attn
        own = (
            attention.sliding_window
            if hasattr(attention, "sliding_window")
            else getattr(attention.config, "sliding_window", None)
        )
        assert decoder.windows[index] == own, index
        assert decoder.rotates[index] == bool(getattr(attention, "use_rope", True)), index


def test_what_a_config_leaves_out_is_what_transformers_assumes() -> None:
    """config.json files written by hand, or before a key existed."""
    for kind, name, changes in (
        ("mistral", "MistralForCausalLM", {}), ("smollm3", "SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 512}),
        ("gemma3_text", "Gemma3ForCausalLM", {}), ("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8}),
    ):  # fmt: skip
        short = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "vocab_size": 99,
        }
        whole = AutoConfig.for_model(kind, **{"pad_token_id": 0, **short, **changes}).to_dict()
        found = Decoder.of({"architectures": [name], **short, **changes})
        wanted = Decoder.of({**whole, "architectures": [name]})
        assert (found.windows, found.rotates, found.head_dim) == (wanted.windows, wanted.rotates, wanted.head_dim), kind


def test_every_architecture_is_tried() -> None:
    assert {decoder_of(one.config()).architecture.name for one in FAMILIES} == {one.name for one in ARCHITECTURES}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "do not know the layers of BloomForCausalLM"),
        ({"architectures": None}, "without architectures"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "relu"}, "activation, relu"),
        ({"head_dim": 12}, "multiple of 8 up to 256 values, and the model's have 12"),
        ({"head_dim": 264}, "have 264"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "16-bit weights and bitsandbytes' 4 bits only"),
        ({"num_attention_heads": None}, "cannot read the model's config.json"),
        ({"num_hidden_layers": 0}, "cannot read the model's config.json"),
        ({"quantization_config": "none"}, "cannot read the model's config.json"),
        ({"architectures": 5}, "cannot read the model's config.json"),
    ],
)
def test_a_model_that_is_not_described_says_why(changes: dict[str, object], told: str) -> None:
    config = {**FAMILIES[0].config().to_dict(), "architectures": ["LlamaForCausalLM"], **changes}
    with pytest.raises(NotDescribed, match=told.replace(".", r"\.")):
        Decoder.of(config)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_the_layers_that_auto_adapts_exist_and_are_peft_s_own_where_it_has_any(family: Family) -> None:
    model = base_model(family.config(), attention="eager")
    auto = default_targets(as_json(model.config))
    assert auto is not None
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(auto) <= names
    mapped = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    assert mapped is None or list(auto) == mapped


def test_a_model_that_is_not_described_leaves_auto_to_peft() -> None:
    assert default_targets({"architectures": ["BloomForCausalLM"]}) is None
    assert default_targets({}) is None


def test_a_checkpoint_in_bitsandbytes_4_bits_is_described_by_its_base() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {**FAMILIES[0].config().to_dict(), "architectures": ["LlamaForCausalLM"]}
    assert Decoder.of({**config, "quantization_config": stored}) == Decoder.of(config)
