"""Proving a merge: the written model is read back as a user would, and compared with the one that was trained.

Every weight is compared with what it must be, and every prediction on held-out rows with the trained model's. The first finds a
fault too small for the second, and the second a fault in what both the merge and the first believe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from job.errors import InputError
from job.model.changes import base_weights, changes_of
from job.model.merge import Recipe
from job.model.quantization import full_weight
from job.model.safetensors_files import Weights

_IGNORED = -100
_FLOOR = 4e-6  # of a weight's largest value: what the order of a float32 sum may change


@dataclass(frozen=True)
class Rows:
    """Held-out rows for the proof: token ids, and the labels that training learns from."""

    ids: list[list[int]]
    labels: list[list[int]]


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities of the next token after every token of each row: (len(row), vocabulary), float32 on the CPU."""

    log_probabilities: list[torch.Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, rows: Rows) -> Predictions:
        device = model.get_input_embeddings().weight.device
        logits = (model(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in rows.ids)
        return cls([torch.log_softmax(row.float(), -1).cpu() for row in logits])

    def loss(self, rows: Rows) -> float | None:
        """Mean nats per learned token. None if no token of the rows is learned."""
        losses = []
        for predicted, labels in zip(self.log_probabilities, rows.labels, strict=True):
            wanted = torch.tensor(labels[1:])
            learned = wanted != _IGNORED
            losses.append(-predicted[:-1][learned].gather(1, wanted[learned][:, None])[:, 0])
        every = torch.cat(losses)
        return float(every.mean()) if len(every) else None

    def distance_to(self, other: Predictions) -> dict[str, float]:
        """Mean and largest KL(self ‖ other) in nats per token, and the share of tokens with the same first choice."""
        divergences, same = [], []
        for ours, theirs in zip(self.log_probabilities, other.log_probabilities, strict=True):
            divergences.append((ours.exp() * (ours - theirs)).sum(-1))
            same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
        divergence = torch.cat(divergences)
        return {
            "mean_kl_nats": float(divergence.mean()),
            "max_kl_nats": float(divergence.max()),
            "same_first_choice": float(torch.cat(same).mean()),
        }


@dataclass(frozen=True)
class WeightCheck:
    """Of all weights: how many values differ by more than rounding, in how many weights, and where it is worst.

    `largest` is the largest ‖W_disk − W‖ / ‖W‖ of a weight.
    """

    values_off: int
    weights_off: int
    worst: str
    largest: float


@torch.no_grad()
def check_weights(
    model: PeftModel, base: Path, folder: Path, recipe: Recipe, go_on: Callable[[], None] = lambda: None
) -> WeightCheck:
    """Compare every weight in `folder` with base and adapter as they are in `model`.

    Where the adapter was merged into the original weights, the base's are read from its files. A value may differ by one
    rounding to the written type. Raises InputError if a weight is missing, or has another shape. Weights that the files
    name otherwise than the model does, such as those of experts, are compared as transformers loads them.
    """
    changes = changes_of(model)
    found: Weights | dict[str, torch.Tensor] = Weights(folder)
    originals = Weights(base) if recipe.held_in is None else None
    off, weights_off, worst, largest = 0, 0, "", -1.0
    tied = _tied(model)
    if any(name not in found and tied.get(name, name) not in found for name, _, _ in base_weights(model)):
        found = load_as_a_user_would(folder, recipe.dtype, torch.device("cpu")).state_dict()
    for name, module, parameter in base_weights(model):
        go_on()
        stored_as = name if name in found else tied.get(name, name)
        if stored_as not in found:
            raise InputError(f"The merged model lacks {name}.", "This is a bug. The adapter is intact.")
        if originals is not None and name in originals and not any(key.startswith(f"{name}.") for key in originals):
            values = originals[name].to(parameter.device)
            if len(values) < len(found[stored_as]):  # new tokens, of which the base's files have no rows
                values = torch.cat([values, parameter.data[len(values) :].to(values.dtype)])
        else:
            values = full_weight(module) if name.endswith("weight") else parameter.data
        wanted = values.float()
        if name in changes:
            wanted = changes[name].rows(wanted, 0)
        stored = found[stored_as]
        if stored.shape != wanted.shape:
            raise InputError(
                f"{name} of the merged model has the shape {tuple(stored.shape)}, not {tuple(wanted.shape)}.",
                "This is a bug. The adapter is intact.",
            )
        count, distance = _differing(stored.to(wanted.device), wanted)
        off, weights_off = off + count, weights_off + bool(count)
        if distance > largest:
            worst, largest = name, distance
    return WeightCheck(off, weights_off, worst, largest)


def _differing(stored: torch.Tensor, wanted: torch.Tensor) -> tuple[int, float]:
    """How many values differ by more than one rounding, and the relative distance of all of them."""
    step = torch.finfo(stored.dtype).eps
    tiny = torch.finfo(stored.dtype).smallest_normal * step
    floor = _FLOOR * float(wanted.abs().max()) + tiny
    differing, squares = 0, 0.0
    for part, right in zip(torch.split(stored, 1024), torch.split(wanted, 1024), strict=True):
        difference = part.float() - right
        # written so that NaN counts too
        differing += int((~(difference.abs() <= right.abs() * step + floor)).sum())
        squares += float(difference.square().sum(dtype=torch.float64))
    norm = float(wanted.norm())
    distance = squares**0.5 / norm if norm else (0.0 if squares == 0 else float("inf"))
    return differing, distance if distance == distance else float("inf")


def _tied(model: PeftModel) -> dict[str, str]:
    """The weights that are another one's, and whose."""
    base = model.get_base_model()
    tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    return dict(getattr(base, "_tied_weights_keys", None) or {}) if tied else {}


def load_as_a_user_would(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The merged model by plain transformers. Raises InputError if the folder lacks one of its weights, or has more."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, output_loading_info=True, trust_remote_code=False
    )
    wrong: Iterable[str] = (*report.get("missing_keys", ()), *report.get("mismatched_keys", ()))
    if names := sorted(map(str, wrong)):
        raise InputError(f"The merged model cannot be loaded whole: {names[0]} is missing.", "The adapter is intact.")
    loaded: PreTrainedModel = model.eval()
    return loaded


def same_beginnings(answers: Sequence[str], others: Sequence[str]) -> int:
    """In how many pairs one answer is the other's beginning: one of them may have been given more tokens."""
    return sum(one.startswith(other) or other.startswith(one) for one, other in zip(answers, others, strict=True))
