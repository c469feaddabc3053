"""The loss over a frozen head, without the logits of all tokens at once and with one product fewer than recomputing them.

What the loss needs of a token is the log-probability of its label, whose gradient with regard to the logits, onehot - p, is
known as soon as the logits are: it goes through the head while they are at hand, and they are forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from trl.trainer.utils import FusedCausalLMOutput

from job.model.fused import pointwise

_IGNORED = -100  # the label of what is not learned, as transformers has it
_TOKENS = 4096  # whose logits exist at once


class _LabelLogProbs(torch.autograd.Function):
    """(tokens, width) states, (vocabulary, width) weights and labels → of each token the label's log-probability, the
    distribution's entropy, and whether the label comes first; the first alone has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            return _label_log_probs(ctx, states, weight, labels)

    @staticmethod
    def backward(ctx: Any, *of_results: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (of_log_prob,) = ctx.saved_tensors
        return of_log_prob * of_results[0].unsqueeze(1).to(of_log_prob.dtype), None, None


def _label_log_probs(
    ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needed = ctx.needs_input_grad[0]
    gradient = torch.empty_like(states) if needed else None
    results = []
    for begin in range(0, max(1, len(states)), _TOKENS):
        part = slice(begin, begin + _TOKENS)
        logits = states[part] @ weight.T
        results.append(pointwise.label_log_probs_(logits, labels[part]))
        if gradient is not None:
            torch.mm(logits, weight, out=gradient[part])
        del logits
    log_probs, entropy, first = (torch.cat(parts) for parts in zip(*results, strict=True))
    ctx.mark_non_differentiable(entropy, first)
    if gradient is not None:
        ctx.save_for_backward(gradient)
    return log_probs, entropy, first


def can_fuse_head(model: PeftModel) -> bool:
    """Whether the head is a plain frozen layer."""
    head: Any = model.get_output_embeddings()
    return bool(type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad)


def fuse_head(model: PeftModel) -> None:
    """Answer trl's trainer, which asks a model for `fused_lm_head` outputs; every other call goes where it went."""
    base = model.get_base_model()
    forward = base.forward

    def answer(*, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return forward(**inputs)
        labels = inputs.pop("labels")[:, 1:]
        inputs.pop("num_items_in_batch", None)
        states = base.base_model(**{**inputs, "use_cache": False}).last_hidden_state[:, :-1]
        mask = labels != _IGNORED
        found = _LabelLogProbs.apply(  # type: ignore[no-untyped-call]
            states[mask], base.get_output_embeddings().weight, labels[mask]
        )
        log_probs, entropy, first = (part.new_zeros(mask.shape).masked_scatter(mask, part) for part in found)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs, entropy=entropy, is_top1=first, label_mask=mask,
        )  # fmt: skip

    base.forward = answer
