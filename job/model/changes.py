"""What an adapter changes: which weights of the plain model, and into what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper

ADAPTER = "default"


class Change(Protocol):
    """What becomes of one weight."""

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """The changed rows for `weight`, the base's rows from `first` on: float32, shape (rows, in_features)."""


@dataclass(frozen=True)
class LowRank:
    """W + scale · B·A, as peft computes it in float32. With `magnitude` the rows get these lengths (DoRA, arXiv:2402.09353)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        own = slice(first, first + len(weight))
        a, b = (matrix.to(weight.device, torch.float32) for matrix in (self.a, self.b[own]))
        changed: torch.Tensor = weight + (b @ a).mul_(self.scale)
        if self.magnitude is None:
            return changed
        length = self.magnitude[own].to(weight.device, torch.float32) / torch.linalg.norm(changed, dim=1)
        return changed.mul_(length[:, None])


@dataclass(frozen=True)
class Rows:
    """Some rows replaced by `values`, those of trained tokens: `indices` are their ids."""

    indices: tuple[int, ...]
    values: torch.Tensor

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        changed = weight.clone()
        for index, values in zip(self.indices, self.values, strict=True):
            if first <= index < first + len(weight):
                changed[index - first] = values.to(weight.device, torch.float32)
        return changed


@dataclass(frozen=True)
class Whole:
    """Every value replaced: a layer that was trained in full."""

    values: torch.Tensor

    def rows(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        return self.values[first : first + len(weight)].to(weight.device, torch.float32)


@torch.no_grad()
def changes_of(model: PeftModel) -> dict[str, Change]:
    """What the adapter in `model` does, by the name of each weight that it changes."""
    found: dict[str, Change] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            magnitude = module.lora_magnitude_vector[ADAPTER].weight if module.use_dora.get(ADAPTER) else None
            found[f"{name}.weight"] = LowRank(
                module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, float(module.scaling[ADAPTER]), magnitude
            )
        elif isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save:
            for local, parameter in module.modules_to_save[ADAPTER].named_parameters():
                found[f"{name}.{local}"] = Whole(parameter.data)
        elif isinstance(module, TrainableTokensLayer):  # a tied one shows the values of the other
            wrapped = name.removesuffix(".token_adapter")
            found[f"{wrapped}.weight"] = Rows(
                tuple(module.token_indices[ADAPTER]), module.trainable_tokens_delta[ADAPTER].data
            )
    return found


def base_weights(model: PeftModel) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """The plain model's parameters by their plain names, with the module that holds each, without what peft added."""
    for name, module in model.get_base_model().named_modules():
        parts = name.split(".")
        if any(part.startswith(("lora_", "trainable_tokens")) or part == "modules_to_save" for part in parts):
            continue
        plain = ".".join(part for part in parts if part not in ("base_layer", "original_module", "token_adapter"))
        for local, parameter in module.named_parameters(recurse=False):
            yield f"{plain}.{local}" if plain else local, module, parameter
