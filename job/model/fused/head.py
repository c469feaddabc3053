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

from job.model.architectures import Decoder
from job.model.fused import pointwise
from job.model.fused.layer import Norm
from job.model.patches import Patches, replaced

_IGNORED = -100  # transformers' label for tokens that are not learned
_TOKENS = 4096  # tokens whose logits exist at once


@dataclass(frozen=True)
class LastNorm:
    """The model's last norm, right before the head, and the cap of the logits if there is one."""

    weight: torch.Tensor
    epsilon: float
    softcap: float | None = None

    @classmethod
    def of(cls, norm: torch.nn.Module, decoder: Decoder) -> LastNorm:
        found = Norm.of(norm, decoder)
        return cls(found.weight, found.epsilon, decoder.head_softcap)


class _LabelLogProbs(torch.autograd.Function):
    """From states before the last norm to log-probabilities of labels, entropies, and whether labels are most likely.

    States are (tokens, width), weights (vocabulary, width), labels and all results (tokens). Only the first result has
    a gradient. Tokens without a label get zeros. Nothing is computed for them, unless `every_token` is: how many have a
    label is then not asked of the GPU.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, norm: LastNorm, weight: torch.Tensor, labels: torch.Tensor, every_token: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            return _label_log_probs(ctx, states, norm, weight, labels, every_token=every_token)

    @staticmethod
    def backward(ctx: Any, *of_results: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_log_prob, rows, learned = ctx.saved_tensors
        norm: LastNorm = ctx.norm
        of_normed, of_rows = torch.empty_like(rows), torch.empty_like(rows)
        weights = of_results[0] * learned if ctx.every_token else of_results[0].index_select(0, learned)
        pointwise.place(of_log_prob, of_normed, weights.unsqueeze(1))
        pointwise.rms_norm_backward(of_normed, rows, norm.weight, norm.epsilon, None, of_rows)
        if not ctx.every_token:
            of_states = rows.new_zeros(len(of_results[0]), rows.shape[1])
            of_rows = of_states.index_copy_(0, learned, of_rows)
        return of_rows, None, None, None, None


def _label_log_probs(
    ctx: Any, states: torch.Tensor, norm: LastNorm, weight: torch.Tensor, labels: torch.Tensor, *, every_token: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    learned = labels != _IGNORED
    if every_token:
        rows, labels = states, labels.clamp(min=0)
    else:
        (learned,) = torch.where(learned)
        rows, labels = states.index_select(0, learned), labels.index_select(0, learned)
    normed = torch.empty_like(rows)
    pointwise.rms_norm_(rows, norm.weight, norm.epsilon, normed)
    needed = ctx.needs_input_grad[0]
    gradient = torch.empty_like(rows) if needed else None
    results = []
    for begin in range(0, max(1, len(rows)), _TOKENS):
        part = slice(begin, begin + _TOKENS)
        logits = _logits(normed[part], weight)
        slope = None
        if norm.softcap is not None:
            torch.tanh(logits.div_(norm.softcap), out=logits)
            slope = 1 - logits.square() if needed else None
            logits.mul_(norm.softcap)
        results.append(pointwise.label_log_probs_(logits, labels[part]))
        if slope is not None:
            logits.mul_(slope)
        if gradient is not None:
            torch.mm(logits, weight, out=gradient[part])
        del logits, slope
    log_probs, entropy, first = (
        torch.cat(parts).masked_fill_(~learned, 0)
        if every_token
        else parts[0].new_zeros(len(states)).index_copy_(0, learned, torch.cat(parts))
        for parts in zip(*results, strict=True)
    )
    ctx.mark_non_differentiable(entropy, first)
    if gradient is not None:
        ctx.save_for_backward(gradient, rows, learned)
        ctx.norm, ctx.every_token = norm, every_token
    return log_probs, entropy, first


def label_log_probs(states: torch.Tensor, norm: LastNorm, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the labels, (tokens), with their gradient. Zero for tokens without a label (-100)."""
    found: torch.Tensor = _LabelLogProbs.apply(states, norm, weight, labels, False)[0]  # type: ignore[no-untyped-call]
    return found


def _logits(normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """normed · weightᵀ. Rows begin at multiples of 16 bytes: products with an odd vocabulary would be slow otherwise."""
    vocabulary = len(weight)
    room = normed.new_empty(len(normed), -(-vocabulary // 8) * 8)
    return torch.mm(normed, weight.T, out=room[:, :vocabulary])


def can_fuse_head(model: PeftModel) -> bool:
    """Whether the head is a plain frozen layer without bias."""
    head: Any = model.get_output_embeddings()
    return bool(type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad)


def fuse_head(model: PeftModel, decoder: Decoder, patches: Patches) -> None:
    """Make the model answer trl's calls with `fused_lm_head=True`. All other calls stay as they were.

    With `every_token` the answer asks the GPU nothing, so that it can be captured.
    """
    base = model.get_base_model()
    forward, norm = base.forward, base.base_model.norm
    last = LastNorm.of(norm, decoder)

    def answer(*, fused_lm_head: bool = False, every_token: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return forward(**inputs)
        labels = inputs.pop("labels")
        inputs.pop("num_items_in_batch", None)
        with replaced(norm, "forward", _pass_on):  # the norm is part of the head here
            states = base.base_model(**{**inputs, "use_cache": False}).last_hidden_state
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)  # each token predicts the next one
        found = _LabelLogProbs.apply(  # type: ignore[no-untyped-call]
            states.flatten(0, 1), last, base.get_output_embeddings().weight, shifted.flatten(), every_token,
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
