"""The check that the fused layers give what the model's own layers give, on this very machine.

Kernels are compiled again for each card, compiler and driver. So one layer is computed both ways on a few tokens before
hours are spent on its gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from job.model.fused import MANY_TOKENS

FEW = (48, 16)  # tokens of each row
MANY = (MANY_TOKENS // 2, MANY_TOKENS // 2 - 100, 100)


@dataclass(frozen=True)
class Sample:
    """One layer's output and gradients for some tokens, without the residual that only passed through."""

    change: torch.Tensor
    of_input: torch.Tensor
    of_adapter: tuple[torch.Tensor, ...]

    @property
    def is_finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in self._parts())

    def differs(self, other: Sample) -> float:
        """The largest relative difference ‖a - b‖ / ‖b‖ among output, input's gradient and each adapter's gradients."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return max(float((one - two).norm() / two.norm().clamp(min=1e-20)) for one, two in pairs)

    def _parts(self) -> tuple[torch.Tensor, ...]:
        return (self.change, self.of_input, *self.of_adapter)


def sample(model: PeftModel, lengths: Sequence[int] = FEW, *, with_dropout: bool = False) -> Sample:
    """Compute the first layer, as it is now, on random rows of these lengths. The model stays unchanged."""
    base: Any = model.get_base_model().base_model
    layer, device = base.layers[0], base.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.embed_tokens.num_embeddings, (1, sum(lengths)), generator=generator).to(device)
    x = base.embed_tokens(ids).detach().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device)
    boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    of_out = torch.randn(x.shape, generator=generator).to(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    training = layer.training
    layer.train(with_dropout)
    weights = [parameter.detach().clone() for parameter in trained]
    try:
        with torch.no_grad():  # B starts at zero, and then the gradients of A would be zero too
            for parameter in trained:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
        with torch.autocast(x.device.type, enabled=False):
            out = layer(
                x,
                position_ids=positions,
                position_embeddings=base.rotary_emb(x, position_ids=positions),
                cu_seq_lens_q=boundaries,
                cu_seq_lens_k=boundaries,
                max_length_q=max(lengths),
                max_length_k=max(lengths),
            )
        out = out[0] if isinstance(out, tuple) else out
        of_x, *of_trained = torch.autograd.grad(out, [x, *trained], of_out)
    finally:
        layer.train(training)
        with torch.no_grad():
            for parameter, value in zip(trained, weights, strict=True):
                parameter.copy_(value)
    return Sample(
        (out.detach().float() - x.detach().float()),
        of_x.float() - of_out.float(),
        tuple(gradient.detach().float() for gradient in of_trained),
    )
