"""What a decoder layer does between its matrix products: norms, rotations, the gate, dropout, and their gradients.

On a GPU each is one Triton kernel that reads and writes its tensors once. Elsewhere each is a few lines of PyTorch with
the same results: those lines say what the kernels must do. Tokens are rows: `x` is (tokens, features).
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467) in float32, rounded before the weight as Llama has
    it, into the first columns of `out`, which is returned."""
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rms_norm(x, weight, epsilon, out)
    out[:, : x.shape[1]] = _normalised(x, epsilon)[0].to(x.dtype) * weight
    return out


def rms_norm_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    residual: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The gradient of `x` behind a norm whose result's gradient is `gradient`, plus the first columns of `residual`, what
    came past it; into the first columns of `out`, which is returned."""
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rms_norm_backward(gradient, x, weight, epsilon, residual, out)
    normalised, inverse = _normalised(x, epsilon)
    scaled = gradient.float() * weight.float()
    own = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    out[:, : x.shape[1]] = (own + residual[:, : x.shape[1]].float()).to(x.dtype)
    return out


def _normalised(x: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide * inverse, inverse


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *, back: bool = False) -> None:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): `heads` and `out` are (tokens, heads, head_dim) and may be one,
    `cos` and `sin` (tokens, head_dim). Rotated `back` it is its own gradient."""
    if heads.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.rotate(heads, cos, sin, out, back)
    sin = -sin if back else sin
    first, second = heads.float().chunk(2, dim=-1)
    c, s = (half.float().unsqueeze(1).chunk(2, dim=-1) for half in (cos, sin))
    out.copy_(torch.cat([first * c[0] - second * s[0], second * c[1] + first * s[1]], dim=-1))
    return None


def gated(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (SwiGLU; Shazeer 2020, arXiv:2002.05202) of gates and values side by side, (tokens, 2 n), into the first
    n columns of `out`, which is returned."""
    if gate_up.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.gated(gate_up, out)
    gate, up = gate_up.float().chunk(2, dim=-1)
    out[:, : gate.shape[1]] = (torch.nn.functional.silu(gate).to(gate_up.dtype).float() * up).to(gate_up.dtype)
    return out


def gated_backward_(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up once more, (tokens, n); `gate_up` is overwritten by its gradient."""
    if gate_up.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.gated_backward_(gradient, gate_up)
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, wide = torch.sigmoid(gate), gradient.float()
    out = gated(gate_up, torch.empty_like(gradient))
    of_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    gate_up.copy_(torch.cat([of_gate, wide * gate * sigmoid], dim=-1))
    return out


def dropout(x: torch.Tensor, probability: float, seed: int, first_row: int = 0) -> torch.Tensor:
    """`x` with each value dropped at `probability`, the others scaled up; the same ones again for the same `seed`, so that
    nothing has to be kept for the backward pass, which is this very function of the gradient. Rows are counted from
    `first_row`: a part of a batch loses what it would lose within the whole."""
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.dropout(x, probability, seed, first_row)
    if not probability:
        return x
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(first_row + len(x), x.shape[1], generator=generator)[first_row:] >= probability
    return x * kept / (1 - probability)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in 8-bit floats (e4m3), its largest value at their largest, 448: the values, and a float32 scale a row."""
    if x.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.quantize_rows(x)
    wide = x.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (wide / scales).to(torch.float8_e4m3fn), scales


def label_log_probs_(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of `logits`, (tokens, vocabulary), the label's log-probability and the entropy, float32 in nats, and
    whether the label is the likeliest. The logits are overwritten by the log-probability's gradient, onehot - p."""
    if logits.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.label_log_probs_(logits, labels)
    log_p = torch.log_softmax(logits.float(), -1)
    chosen = log_p.gather(1, labels.unsqueeze(1))
    entropy, first = -(log_p.exp() * log_p).sum(-1), chosen.squeeze(1) >= log_p.amax(-1)
    logits.copy_(-log_p.exp()).scatter_add_(1, labels.unsqueeze(1), torch.ones_like(chosen, dtype=logits.dtype))
    return chosen.squeeze(1), entropy, first


def dequantize(weight: bnb.nn.Params4bit, out: torch.Tensor) -> None:
    """The values of a 4-bit weight, as bitsandbytes makes them, into `out` (outputs, inputs), whose rows may lie apart."""
    if out.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.dequantize(weight, out)
    out.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    return None


def place(values: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """`values`, (rows, columns), times `scale` into `out`, whose rows may lie apart and whose type may be another."""
    if out.is_cuda:
        from job.model.fused import triton_kernels

        return triton_kernels.place(values, out, scale)
    torch.mul(values, scale, out=out)
    return None


def eight_bit_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *, fast: bool) -> torch.Tensor:
    """x, rounded row by row, times the transpose of a weight that `quantize_rows` gave, (outputs, inputs) and (outputs, 1).
    `fast` sums up in fewer digits than float32, which forward products stand and gradients do less."""
    values, own = quantize_rows(x)
    if not x.is_cuda:
        return ((values.float() * own) @ (weight.float() * scales).T).to(x.dtype)
    return torch._scaled_mm(values, weight.T, scale_a=own, scale_b=scales.T, out_dtype=x.dtype, use_fast_accum=fast)
