"""The proof before the first step: it passes right layers of every kind, and each planted fault fails it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from job.model.attention import register_varlen
from job.model.fused import attention, head, layer, pointwise
from job.model.fused.frozen import Bordered, Frozen
from job.model.fused.layer import FusedLayer, Weights, fuse_layer
from job.model.fused.products import Normed, Products
from job.model.fused.proof import FEW, MANY, Proof
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from tests.model.families import FAMILIES, Family, adapted, base_model, decoder_of

_LLAMA = FAMILIES[0]


def failure(
    family: Family = _LLAMA, weights: Weights = "resident", dropout: float = 0.0, dtype: Any = None
) -> str | None:
    """What the proof says of the family's layers, and of its head."""
    config = family.config(hidden_size=128, intermediate_size=192, vocab_size=300)
    model = adapted(base_model(config, dtype or torch.float32, attention=register_varlen()), 8, None, dropout)
    decoder, patches = decoder_of(config), Patches()
    proof = Proof(model, decoder, many=False)
    workspace = Workspace(patches)
    found = []
    for index in proof.kinds():
        proof.prepare(index)
        fused = fuse_layer(model, index, decoder, weights, workspace, patches)
        found.append(proof.failure(index, fused, eight_bit=weights == "fp8"))
    return next(filter(None, [*found, proof.head_failure()]), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_right_layers_pass(family: Family, dropout: float, dtype: torch.dtype) -> None:
    assert failure(family, dropout=dropout, dtype=dtype) is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_right_layers_with_8_bit_products_pass(family: Family, dropout: float) -> None:
    assert failure(family, "fp8", dropout, torch.bfloat16) is None


def test_a_layer_of_each_kind_is_looked_at() -> None:
    smollm = next(one for one in FAMILIES if one.name == "smollm 3")
    gemma = next(one for one in FAMILIES if one.name == "gemma 3")
    for family, kinds in ((_LLAMA, [0]), (smollm, [0, 3]), (gemma, [0, 5])):
        config = family.config()
        assert Proof(adapted(base_model(config)), decoder_of(config), many=False).kinds() == kinds


Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[Plant, float]] = {}


def fault(name: str, dropout: float = 0.0) -> Callable[[Plant], Plant]:
    def keep(plant: Plant) -> Plant:
        FAULTS[name] = plant, dropout
        return plant

    return keep


def _around(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(function, *arguments)`."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def changed(*arguments: Any, **named: Any) -> Any:
        return change(plain, *arguments, **named)

    monkeypatch.setattr(owner, name, changed)


@fault("adapters ignored forward")
def _(m: pytest.MonkeyPatch) -> None:
    _around(
        m, Bordered, "product_", lambda f, s, x, narrow, out, r: f(s, x, None if narrow is None else narrow * 0, out, r)
    )


@fault("adapters ignored in the input's gradient")
def _(m: pytest.MonkeyPatch) -> None:
    def without(f: Any, s: Any, of_y: Any, of_narrow: Any, rounded: Any) -> Any:
        return f(s, of_y, None, rounded)

    _around(m, Bordered, "gradient", without)


@fault("another mask in the backward pass", dropout=0.1)
def _(m: pytest.MonkeyPatch) -> None:
    def other(f: Any, x: Any, p: float, seed: int, *others: Any, add_to_: Any = None) -> Any:
        return f(x, p, seed + 1 if add_to_ is not None else seed, *others, add_to_=add_to_)

    _around(m, pointwise, "dropout_", other)


@fault("a mask of which nothing is dropped forward", dropout=0.1)
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Products, "_narrow", lambda f, s, x, seeds: s.inner(x) @ s._frozen.a.T)


@fault("a mask that is not scaled", dropout=0.1)
def _(m: pytest.MonkeyPatch) -> None:
    def unscaled(f: Any, x: Any, p: float, *others: Any, **named: Any) -> Any:
        add_to = named.pop("add_to_", None)
        found = f(x, p, *others, **named) * (1 - p)
        return found if add_to is None else add_to.add_(found)

    _around(m, pointwise, "dropout_", unscaled)


@fault("twice as much is dropped", dropout=0.1)
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "dropout_", lambda f, x, p, *others, **named: f(x, 2 * p, *others, **named))


@fault("all linear layers drop the same", dropout=0.1)
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Products, "_narrow", lambda f, s, x, seeds: f(s, x, [seeds[0]] * len(seeds)))


@fault("adapters copied once and never again")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Frozen, "refresh", lambda f, s, adapters: None if s._copied is not None else f(s, adapters))


@fault("a recomputed layer without rotation")
def _(m: pytest.MonkeyPatch) -> None:
    def once(f: Any, s: Any, x: Any, rows: Any, seeds: Any) -> Any:
        if s.kept or torch.is_grad_enabled():
            return f(s, x, rows, seeds)
        s.seen = not getattr(s, "seen", False)
        return f(s, x, rows if s.seen else attention.Rows(None, None, rows.boundaries, rows.longest), seeds)

    _around(m, FusedLayer, "middle", once)


@fault("the gate's result 15% too large")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "gated", lambda f, *a, **n: f(*a, **n).mul_(1.15))


@fault("B's gradient 15% too large")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Products, "of_b", lambda f, *a: [part * 1.15 for part in f(*a)])


@fault("A's gradient 15% too large")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Products, "of_a", lambda f, *a: [part * 1.15 for part in f(*a)])


@fault("the gate in 8-bit floats")
def _(m: pytest.MonkeyPatch) -> None:
    def rounded(f: Any, *a: Any, **n: Any) -> Any:
        found = f(*a, **n)
        return found.copy_(found.to(torch.float8_e5m2).to(found.dtype))

    _around(m, pointwise, "gated", rounded)


@fault("the norm's epsilon ignored")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rms_norm_", lambda f, x, w, epsilon, *a, **n: f(x, w, 0.0, *a, **n))


@fault("the norm's epsilon ignored in its gradient")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rms_norm_backward", lambda f, g, x, w, epsilon, *a, **n: f(g, x, w, 0.0, *a, **n))


@fault("the norm's weight ignored in its gradient")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rms_norm_backward", lambda f, g, x, w, *a, **n: f(g, x, torch.ones_like(w), *a, **n))


@fault("the residual added twice")
def _(m: pytest.MonkeyPatch) -> None:
    _around(
        m,
        pointwise,
        "rms_norm_",
        lambda f, x, w, e, o, r=None, add=None: f(x, w, e, o, r, None if add is None else 2 * add),
    )


@fault("the residual's gradient lost")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rms_norm_backward", lambda f, g, x, w, e, residual, *a: f(g, x, w, e, None, *a))


@fault("scores scaled by another factor")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, layer, "Scores", lambda f, scaling, *a: f(scaling * 1.1, *a))


@fault("tokens see the row before theirs")
def _(m: pytest.MonkeyPatch) -> None:
    def one_row(f: Any, q: Any, k: Any, v: Any, rows: Any, *others: Any) -> Any:
        whole = torch.tensor([0, len(q)], dtype=torch.int32)
        return f(q, k, v, attention.Rows(rows.cos, rows.sin, whole, len(q)), *others)

    _around(m, layer, "attend", one_row)


@fault("rotated the other way")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rotate", lambda f, heads, cos, sin, out: f(heads, cos, -sin, out))


@fault("gradients not rotated back")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, pointwise, "rotate_back", lambda f, q, k, v, cos, sin, out: f(q, k, v, None, None, out))


@fault("one token's gradient lost")
def _(m: pytest.MonkeyPatch) -> None:
    def lost(f: Any, *a: Any, **n: Any) -> Any:
        found = f(*a, **n)
        found[5] = 0
        return found

    _around(m, pointwise, "rms_norm_backward", lost)


@fault("one token's output doubled")
def _(m: pytest.MonkeyPatch) -> None:
    def doubled(f: Any, s: Any, x: Any, *a: Any) -> Any:
        out, *others = f(s, x, *a)
        out[7] += out[7] - x[7]
        return out, *others

    _around(m, FusedLayer, "forward", doubled)


@fault("not a number in one place")
def _(m: pytest.MonkeyPatch) -> None:
    def broken(f: Any, *a: Any, **n: Any) -> Any:
        found = f(*a, **n)
        found[3, 3] = float("nan")
        return found

    _around(m, pointwise, "gated", broken)


@fault("gate and up exchanged in the gradient")
def _(m: pytest.MonkeyPatch) -> None:
    def exchanged(f: Any, gradient: Any, gate_up_: Any, *a: Any, **n: Any) -> Any:
        found = f(gradient, gate_up_, *a, **n)
        gate_up_.copy_(torch.cat(gate_up_.chunk(2, dim=1)[::-1], 1))
        return found

    _around(m, pointwise, "gated_backward_", exchanged)


@fault("LoRA's scale ignored")
def _(m: pytest.MonkeyPatch) -> None:
    def unscaled(f: Any, s: Any, adapters: Any) -> Any:
        values, places, scales = f(s, adapters)
        return values, places, [1.0] * len(scales)

    _around(m, Frozen, "_copies", unscaled)


@fault("the norm that is not stored without its weight")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, Normed, "products", lambda f, s, other: f(s, other) / s.weight)


@fault("the head without its norm's weight")
def _(m: pytest.MonkeyPatch) -> None:
    _around(m, head, "label_log_probs", lambda f, states, norm, weight, labels: f(states, norm, weight * 1.05, labels))
    m.setattr("job.model.fused.proof.label_log_probs", head.label_log_probs)


@fault("the head's gradient halved")
def _(m: pytest.MonkeyPatch) -> None:
    def halved(f: Any, logits: Any, labels: Any) -> Any:
        found = f(logits, labels)
        logits *= 0.5
        return found

    _around(m, pointwise, "label_log_probs_", halved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FAULTS))
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    plant, dropout = FAULTS[name]
    plant(monkeypatch)
    assert failure(dropout=dropout, dtype=dtype) is not None


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("smollm 3", lambda m: m.setattr(layer, "Rows", lambda cos, sin, *a: attention.Rows(None, None, *a))),
        (
            "mistral, window longer than rows",
            lambda m: _around(m, attention, "row_by_row", lambda f, q, k, v, b, s, w, c: f(q, k, v, b, s, None, c)),
        ),
        ("mistral, window shorter than rows", lambda m: m.setattr(layer, "Scores", lambda s, w, c: attention.Scores(s, None, c))),
        ("gemma 2", lambda m: m.setattr(layer, "Scores", lambda s, w, c: attention.Scores(s, w, None))),
        ("gemma 3", lambda m: _around(m, pointwise, "norm_heads_backward_", lambda f, *a: None)),
        ("qwen 3", lambda m: _around(m, pointwise, "norm_heads_", lambda f, h, w, e, b: f(h, w * 1.02, e, b))),
        ("qwen 2", lambda m: m.setattr("job.model.fused.frozen.bias_of", lambda layers, dtype: None)),
        ("gemma 3", lambda m: _around(m, pointwise, "gated", lambda f, *a, gelu=False: f(*a))),
    ],
)  # fmt: skip
def test_a_fault_in_what_sets_a_family_apart_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, planted: Callable[[pytest.MonkeyPatch], None]
) -> None:
    planted(monkeypatch)
    assert failure(next(one for one in FAMILIES if one.name == name)) is not None


def test_layers_whose_weights_are_held_in_another_way_are_another_kind() -> None:
    config = _LLAMA.config(num_hidden_layers=3)
    model = adapted(base_model(config))
    layer = model.get_base_model().base_model.layers[2].mlp.down_proj
    layer.base_layer = bnb.nn.Linear4bit(config.intermediate_size, config.hidden_size, bias=False)
    assert Proof(model, decoder_of(config), many=False).kinds() == [0, 2]


def test_adapters_have_their_own_values_again_after_the_proof() -> None:
    config = _LLAMA.config()
    model = adapted(base_model(config, attention=register_varlen()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    decoder, patches = decoder_of(config), Patches()
    proof = Proof(model, decoder, many=False)
    proof.prepare(0)
    assert proof.failure(0, fuse_layer(model, 0, decoder, "resident", Workspace(patches), patches)) is None
    patches.undo()
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_where_a_layer_in_float32_does_not_fit_the_judge_sits_on_the_cpu_and_sees_few_tokens() -> None:
    config = _LLAMA.config()
    model, decoder = adapted(base_model(config)), decoder_of(config)
    assert Proof(model, decoder, many=True)._lengths == [FEW, MANY]
    assert Proof(model, decoder, many=True, free_bytes=1e6)._lengths == [FEW]
    with torch.device("meta"):
        elsewhere = adapted(base_model(config))
    assert Proof(elsewhere, decoder, many=False)._on.type == "meta"
    assert Proof(elsewhere, decoder, many=False, free_bytes=1e4)._on.type == "cpu"
