"""Whether the fused layers give, on this very machine, what the model's own layers give.

Kernels are compiled anew for each card, compiler and driver. A layer is computed both ways on a few tokens before hours are
spent on its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

_LENGTHS = (48, 16)


@dataclass(frozen=True)
class Sample:
    """What one layer made of some tokens: its output and the gradients, less what only passed through."""

    change: torch.Tensor
    of_input: torch.Tensor
    of_adapter: torch.Tensor

    @property
    def is_finite(self) -> bool:
        return all(bool(part.isfinite().all()) for part in (self.change, self.of_input, self.of_adapter))

    def differs(self, other: Sample) -> float:
        """The largest of the three relative differences, ‖a - b‖ / ‖b‖."""
        pairs = (
            (self.change, other.change),
            (self.of_input, other.of_input),
            (self.of_adapter, other.of_adapter),
        )
        return max(float((one - two).norm() / two.norm().clamp(min=1e-20)) for one, two in pairs)


def sample(model: PeftModel, *, with_dropout: bool = False) -> Sample:
    """Compute the first layer, as it is computed now; no gradient is kept."""
    base: Any = model.get_base_model().base_model
    layer, device = base.layers[0], base.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.embed_tokens.num_embeddings, (1, sum(_LENGTHS)), generator=generator).to(device)
    x = base.embed_tokens(ids).detach().requires_grad_()
    positions = torch.cat([torch.arange(length) for length in _LENGTHS]).unsqueeze(0).to(device)
    boundaries = torch.tensor([0, _LENGTHS[0], sum(_LENGTHS)], dtype=torch.int32, device=device)
    of_out = torch.randn(x.shape, generator=generator).to(x)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    training = layer.training
    layer.train(with_dropout)
    try:
        with torch.autocast(x.device.type, enabled=False):
            out = layer(
                x,
                position_ids=positions,
                position_embeddings=base.rotary_emb(x, position_ids=positions),
                cu_seq_lens_q=boundaries,
                cu_seq_lens_k=boundaries,
                max_length_q=max(_LENGTHS),
                max_length_k=max(_LENGTHS),
            )
        out = out[0] if isinstance(out, tuple) else out
        of_x, *of_trained = torch.autograd.grad(out, [x, *trained], of_out)
    finally:
        layer.train(training)
    return Sample(
        (out.detach().float() - x.detach().float()),
        of_x.float() - of_out.float(),
        torch.cat([x.new_zeros(1).float(), *(gradient.float().flatten() for gradient in of_trained)]).detach(),
    )
