"""The loss over a frozen head, without the logits of all tokens at once and without computing them twice.

The loss only needs the log-probability of each token's label. Its gradient with respect to the logits, onehot - p, is
known as soon as the logits are. So it goes back through the head right away, and the logits are freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from trl.trainer.utils import FusedCausalLMOutput

from job.model.fused import pointwise
from job.model.patches import Patches, replaced

_IGNORED = -100  # transformers' label for tokens that are not learned
_TOKENS = 4096  # tokens whose logits exist at once


@dataclass(frozen=True)
class _Norm:
    """The model's last norm, right before the head."""

    weight: torch.Tensor
    epsilon: float


class _LabelLogProbs(torch.autograd.Function):
    """From states before the last norm to log-probabilities of labels, entropies, and whether labels are most likely.

    States are (tokens, width), weights (vocabulary, width), labels and all results (tokens). Only the first result has
    a gradient. Tokens without a label get zeros, and nothing is computed for them.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, norm: _Norm, weight: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            return _label_log_probs(ctx, states, norm, weight, labels)

    @staticmethod
    def backward(ctx: Any, *of_results: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_log_prob, rows, learned = ctx.saved_tensors
        norm: _Norm = ctx.norm
        of_normed = torch.empty_like(rows)
        pointwise.place(of_log_prob, of_normed, of_results[0].index_select(0, learned).unsqueeze(1))
        of_states = rows.new_zeros(len(of_results[0]), rows.shape[1])
        of_rows = torch.empty_like(rows)
        pointwise.rms_norm_backward(of_normed, rows, norm.weight, norm.epsilon, None, of_rows)
        return of_states.index_copy_(0, learned, of_rows), None, None, None


def _label_log_probs(
    ctx: Any, states: torch.Tensor, norm: _Norm, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (learned,) = torch.where(labels != _IGNORED)
    rows, labels = states.index_select(0, learned), labels.index_select(0, learned)
    normed = torch.empty_like(rows)
    pointwise.rms_norm_(rows, norm.weight, norm.epsilon, normed)
    needed = ctx.needs_input_grad[0]
    gradient = torch.empty_like(rows) if needed else None
    results = []
    for begin in range(0, max(1, len(rows)), _TOKENS):
        part = slice(begin, begin + _TOKENS)
        logits = normed[part] @ weight.T
        results.append(pointwise.label_log_probs_(logits, labels[part]))
        if gradient is not None:
            torch.mm(logits, weight, out=gradient[part])
        del logits
    log_probs, entropy, first = (
        parts[0].new_zeros(len(states)).index_copy_(0, learned, torch.cat(parts))
        for parts in zip(*results, strict=True)
    )
    ctx.mark_non_differentiable(entropy, first)
    if gradient is not None:
        ctx.save_for_backward(gradient, rows, learned)
        ctx.norm = norm
    return log_probs, entropy, first


def can_fuse_head(model: PeftModel) -> bool:
    """Whether the head is a plain frozen layer without bias."""
    head: Any = model.get_output_embeddings()
    return bool(type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad)


def fuse_head(model: PeftModel, patches: Patches) -> None:
    """Make the model answer trl's calls with `fused_lm_head=True`. All other calls stay as they were."""
    base = model.get_base_model()
    forward, norm = base.forward, base.base_model.norm

    def answer(*, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return forward(**inputs)
        labels = inputs.pop("labels")
        inputs.pop("num_items_in_batch", None)
        with replaced(norm, "forward", _pass_on):  # the norm is part of the head here
            states = base.base_model(**{**inputs, "use_cache": False}).last_hidden_state
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)  # each token predicts the next one
        found = _LabelLogProbs.apply(  # type: ignore[no-untyped-call]
            states.flatten(0, 1), _Norm(norm.weight, norm.variance_epsilon), base.get_output_embeddings().weight,
            shifted.flatten(),
        )  # fmt: skip
        log_probs, entropy, first = (part.view(labels.shape)[:, :-1] for part in found)
        mask = shifted[:, :-1] != _IGNORED
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / mask.sum().clamp(min=1),
            log_probs=log_probs, entropy=entropy, is_top1=first, label_mask=mask,
        )  # fmt: skip

    patches.replace(base, "forward", answer)


def _pass_on(states: torch.Tensor) -> torch.Tensor:
    return states
