"""Everything between the matrix products of a decoder layer: norms, rotations, the gate, dropout, and their gradients.

On a GPU each function is one Triton kernel that reads and writes its tensors once. Elsewhere it is a few lines of
PyTorch with the same results, and these lines specify the kernels. Rows are tokens: `x` is (tokens, features). If
`rounded` is given, the result is also written there in 8 bits. A trailing `_` marks what is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import bitsandbytes as bnb
import torch

from job.model.fused.rounding import Rounded


def rms_norm_(
    x_: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    out: torch.Tensor,
    rounded: Rounded | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) into the first columns of `out`.

    It is computed in float32 and rounded before the weight, as in Llama, or only after a `weight` that is wider than `x_`,
    as in Gemma. If `add` (tokens, features) is given, `x_` is first overwritten by the sum of both. Returns the factor of
    each row, (tokens, 1) in float32.
    """
    if x_.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rms_norm_(x_, weight, epsilon, out, rounded, add)
    if add is not None:
        x_ += add
    normalised, inverse = _normalised(x_, epsilon)
    out[:, : x_.shape[1]] = (normalised.to(weight.dtype) * weight).to(x_.dtype)
    _round(out[:, : x_.shape[1]], rounded)
    return inverse


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    rounded: Rounded | None = None,
) -> torch.Tensor:
    """The gradient of a norm's input `x`, given the `gradient` of its result, into the first columns of `out`.

    If `residual` is given, its first columns are added: the gradient that bypassed the norm. Returns `out`.
    """
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rms_norm_backward(gradient, x, weight, epsilon, residual, out, rounded)
    normalised, inverse = _normalised(x, epsilon)
    scaled = gradient.float() * weight.float()
    own = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    out[:, : x.shape[1]] = (own if residual is None else own + residual[:, : x.shape[1]].float()).to(x.dtype)
    _round(out[:, : x.shape[1]], rounded)
    return out


def _normalised(x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


def _round(x: torch.Tensor, rounded: Rounded | None) -> None:
    for part, found in zip(rounded or (), quantize_rows(x) if rounded is not None else (), strict=True):
        part.copy_(found)


def norm_heads_(heads_: torch.Tensor, weights: torch.Tensor, epsilon: float, before: torch.Tensor) -> None:
    """`rms_norm_` of each head, in place. `before` receives what was there.

    `heads_` and `before` are (tokens, heads, head_dim), and `weights` (heads, head_dim).
    """
    if heads_.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.norm_heads_(heads_, weights, epsilon, before)
    before.copy_(heads_)
    heads_.copy_(_normalised(heads_, epsilon)[0].to(weights.dtype) * weights)
    return None


def norm_heads_backward_(gradient_: torch.Tensor, before: torch.Tensor, weights: torch.Tensor, epsilon: float) -> None:
    """Overwrite the gradient of `norm_heads_`'s result, (tokens, heads, head_dim), by that of `before`."""
    if gradient_.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.norm_heads_backward_(gradient_, before, weights, epsilon)
    normalised, inverse = _normalised(before, epsilon)
    scaled = gradient_.float() * weights.float()
    gradient_.copy_(inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)))
    return None


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864). `cos` and `sin` are (tokens, rotated).

    `heads` and `out` are (tokens, heads, head_dim), and may be the same tensor. Only the first `rotated` values of each
    head are rotated and written.
    """
    if heads.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rotate(heads, cos, sin, out)
    rotated = cos.shape[1]
    first, second = heads[..., :rotated].float().chunk(2, dim=-1)
    c, s = (half.float().unsqueeze(1).chunk(2, dim=-1) for half in (cos, sin))
    out[..., :rotated] = torch.cat([first * c[0] - second * s[0], second * c[1] + first * s[1]], dim=-1)
    return None


def rotate_back(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The gradient of `rotate`: write the gradients of queries and keys, rotated back, and of values side by side.

    The gradients are (tokens, heads, head_dim) each. They go to the first columns of `out`, (tokens, …). Without `cos` and
    `sin` nothing is rotated.
    """
    if query.is_cuda and cos is not None and sin is not None and cos.shape[1] == query.shape[2]:
        from job.model.fused import triton_kernels

        return triton_kernels.rotate_back(query, key, value, cos, sin, out)
    begin = 0
    for part in (query, key, value):
        flat = part.flatten(1)
        place(flat, out[:, begin : begin + flat.shape[1]])
        begin += flat.shape[1]
    rotate_back_(out, query.shape[1] + key.shape[1], query.shape[2], cos, sin)
    return None


def rotate_back_(out_: torch.Tensor, heads: int, dim: int, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    """Rotate the gradients of the first `heads` heads of `out_`, of `dim` values each, back in place."""
    if cos is not None and sin is not None:
        rotated = out_[:, : heads * dim].unflatten(1, (heads, dim))  # type: ignore[no-untyped-call]
        rotate(rotated, cos, -sin, out=rotated)


def gated(
    gate_up: torch.Tensor, out: torch.Tensor, rounded: Rounded | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """act(gate) · up (SwiGLU; Shazeer 2020, arXiv:2002.05202) into the first n columns of `out`, which is returned.

    `gate_up` is gate and up side by side: (tokens, 2 n). act is silu, or with `gelu` the GELU by tanh (Hendrycks & Gimpel
    2016, arXiv:1606.08415).
    """
    if gate_up.is_cuda:
        from job.model.fused import gate_kernels

        return gate_kernels.gated(gate_up, out, rounded, gelu)
    gate, up = gate_up.float().chunk(2, dim=-1)
    inner, _ = _inner(gate, gelu)
    opened = (gate * torch.sigmoid(inner)).to(gate_up.dtype)
    out[:, : gate.shape[1]] = (opened.float() * up).to(gate_up.dtype)
    _round(out[:, : gate.shape[1]], rounded)
    return out


_GELU, _GELU_CUBE = 1.5957691216057308, 0.044715  # 2 √(2 / π), since tanh(x) = 2 sigmoid(2 x) - 1


def _inner(gate: torch.Tensor, gelu: bool) -> tuple[torch.Tensor, torch.Tensor | float]:
    """z and its derivative, for act(gate) = gate · sigmoid(z)."""
    if not gelu:
        return gate, 1.0
    squared = gate * gate
    return _GELU * gate * (1 + _GELU_CUBE * squared), _GELU * (1 + 3 * _GELU_CUBE * squared)


def gated_backward_(
    gradient: torch.Tensor, gate_up_: torch.Tensor, rounded: Rounded | None = None, *, gelu: bool = False
) -> torch.Tensor:
    """Overwrite `gate_up_` (tokens, 2 n) with its gradient, and return act(gate) · up again: (tokens, n).

    `gradient` (tokens, n) is that of `gated`'s result. `rounded` receives the gradient of `gate_up_`.
    """
    if gate_up_.is_cuda:
        from job.model.fused import gate_kernels

        return gate_kernels.gated_backward_(gradient, gate_up_, rounded, gelu)
    gate, up = gate_up_.float().chunk(2, dim=-1)
    inner, slope = _inner(gate, gelu)
    sigmoid, wide = torch.sigmoid(inner), gradient.float()
    out = gated(gate_up_, torch.empty_like(gradient), gelu=gelu)
    of_gate = wide * up * sigmoid * (1 + gate * slope * (1 - sigmoid))
    gate_up_.copy_(torch.cat([of_gate, wide * gate * sigmoid], dim=-1))
    _round(gate_up_, rounded)
    return out


def gated_narrow(gate_up: torch.Tensor, a: torch.Tensor, out: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """`gated`, returning the product of its result and `a`ᵀ: (tokens, ranks) for `a` (ranks, n)."""
    if gate_up.is_cuda:
        from job.model.fused import gate_kernels

        if gate_kernels.serves([gate_up], [a]):
            return gate_kernels.gated_narrow(gate_up, a, out, gelu)
    return gated(gate_up, out, gelu=gelu)[:, : a.shape[1]] @ a.T


class Beside(NamedTuple):
    """The factors that turn the gate's gradients into those of the adapters around it, (tokens, ranks) each.

    They are the gradient of `down`'s narrow product, and the narrow products of gate and up with their LoRA scales.
    None stands for a missing adapter.
    """

    of_down: torch.Tensor | None
    gate: torch.Tensor | None
    up: torch.Tensor | None
    scales: tuple[float, float]


class Adapted(NamedTuple):
    """The gradients of `down`'s A (ranks, n), and of gate's and up's B, scaled, (n, ranks) each. None if unadapted."""

    of_down: torch.Tensor | None
    of_gate: torch.Tensor | None
    of_up: torch.Tensor | None


def gated_backward_adapted_(
    gradient: torch.Tensor, gate_up_: torch.Tensor, beside: Beside, *, gelu: bool = False
) -> Adapted:
    """`gated_backward_`, returning the adapters' gradients in float32 instead of act(gate) · up, which is not stored."""
    if gate_up_.is_cuda:
        from job.model.fused import gate_kernels

        if gate_kernels.serves([gate_up_, gradient], beside[:3]):
            return Adapted(*gate_kernels.gated_backward_adapted_(gradient, gate_up_, *beside, gelu=gelu))
    act = gated_backward_(gradient, gate_up_, gelu=gelu)
    of_a = None if beside.of_down is None else gradient_product(beside.of_down, act)
    of_gate, of_up = (
        None if narrow is None else gradient_product(half, narrow, scale)
        for half, narrow, scale in zip(gate_up_.chunk(2, dim=-1), beside[1:3], beside.scales, strict=True)
    )
    return Adapted(of_a, of_gate, of_up)


def dropout_(
    x: torch.Tensor,
    probability: float,
    seed: int,
    first_row: int = 0,
    moment: torch.Tensor | None = None,
    *,
    add_to_: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x` with each value dropped with `probability`, and the others scaled up.

    The same `seed` drops the same values, so no mask is kept: the backward pass is this function applied to the
    gradient. Rows are counted from `first_row`, so a micro-batch drops what it would drop within the whole batch. If
    `moment` is given, (2) int64, its values are added to both: a captured pass reads them when it is launched. If
    `add_to_` is given, the result is added to it in place.
    """
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.dropout_(x, probability, seed, first_row, moment, add_to_=add_to_)
    if moment is not None:
        seed, first_row = (number + int(more) for number, more in zip((seed, first_row), moment, strict=True))
    if probability:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(first_row + len(x), x.shape[1], generator=generator)[first_row:] >= probability
        x = x * kept / (1 - probability)
    return x if add_to_ is None else add_to_.add_(x)


def quantize_rows(x: torch.Tensor) -> Rounded:
    """Round each row to 8-bit floats, scaled so that its largest value becomes 448, the largest of e4m3."""
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.quantize_rows(x)
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return Rounded((wide / scales).to(torch.float8_e4m3fn), scales)


def label_log_probs_(logits_: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The label's log-probability, the entropy, and whether the label is the most likely token: (tokens) each.

    The first two are float32, in nats. `logits_` (tokens, vocabulary) is overwritten by the log-probability's gradient,
    onehot - p.
    """
    if logits_.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.label_log_probs_(logits_, labels)
    log_p = torch.log_softmax(logits_.float(), -1)
    chosen = log_p.gather(1, labels.unsqueeze(1))
    entropy, first = -(log_p.exp() * log_p).sum(-1), chosen.squeeze(1) >= log_p.amax(-1)
    logits_.copy_(-log_p.exp()).scatter_add_(1, labels.unsqueeze(1), torch.ones_like(chosen, dtype=logits_.dtype))
    return chosen.squeeze(1), entropy, first


def dequantize(weights: Sequence[bnb.nn.Params4bit], outs: Sequence[torch.Tensor]) -> None:
    """Write the values of 4-bit weights to `outs`, (outputs, inputs) each, exactly as bitsandbytes dequantizes them.

    The weights must have the same number of inputs and the same quantization. `outs` are views of one matrix, whose
    rows may be longer.
    """
    if outs[0].is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.dequantize(weights, outs)
    for weight, out in zip(weights, outs, strict=True):
        out.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    return None


def place(values: torch.Tensor, out: torch.Tensor, factors: torch.Tensor | None = None) -> None:
    """Copy `values` (rows, columns) to `out`. Their types and strides may differ.

    If `factors`, (rows, 1) in float32, are given, each row is multiplied by its own.
    """
    if out.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.place(values, out, factors)
    out.copy_(values if factors is None else values * factors)
    return None


def place_all(values: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scales: Sequence[float]) -> None:
    """`place` for many matrices in one launch, each times its scale. `values` must be contiguous and of one type."""
    if outs[0].is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.place_all(values, outs, scales)
    for one, out, scale in zip(values, outs, scales, strict=True):
        torch.mul(one, scale, out=out)
    return None


def gradient_product(left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """scale · leftᵀ · right in float32, for `left` (tokens, m) and `right` (tokens, n): (m, n). Not rounded to 16 bits."""
    if left.dtype == torch.float32:
        found = left.T @ right
    elif left.is_cuda:
        found = torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        found = left.T.float() @ right.float()
    return found if scale == 1.0 else found.mul_(scale)


def eight_bit_product(x: Rounded, weight: Rounded, dtype: torch.dtype, *, fast: bool) -> torch.Tensor:
    """x times the transpose of a weight (outputs, inputs): (tokens, outputs) in `dtype`.

    `fast` accumulates with fewer digits than float32. Forward products tolerate that better than gradients.
    """
    if not x.values.is_cuda:
        return ((x.values.float() * x.scales) @ (weight.values.float() * weight.scales).T).to(dtype)
    return torch._scaled_mm(
        x.values, weight.values.T, scale_a=x.scales, scale_b=weight.scales.T, out_dtype=dtype, use_fast_accum=fast
    )
