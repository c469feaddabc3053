"""A decoder layer, and the loss over the head, by plain formulas in float32: what the proof compares with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from job.model.changes import ADAPTER
from job.model.fused.head import LastNorm
from job.model.fused.products import base_of
from job.model.quantization import full_weight


class Judge:
    """A decoder layer in float32, with copies of all its weights. It computes LoRA by its formula, without peft."""

    def __init__(self, layer: Any, index: int, device: torch.device) -> None:
        self.device = device
        with torch.device("meta"):
            self.layer = type(layer)(layer.self_attn.config, index)
        self._linear: dict[str, _Adapted] = {}
        for name, module in list(self.layer.named_modules()):
            own = layer.get_submodule(name)
            if isinstance(module, torch.nn.Linear):
                parent, _, child = name.rpartition(".")
                self._linear[name] = _Adapted(own, device)
                setattr(self.layer.get_submodule(parent), child, self._linear[name])
            else:
                for key, value in own.named_parameters(recurse=False):
                    setattr(module, key, torch.nn.Parameter(value.detach().to(device).float(), requires_grad=False))
        self.layer.train(layer.training)
        self.trained = [part for one in self._linear.values() for part in one.trained]

    @contextlib.contextmanager
    def dropping(self, masks: dict[str, torch.Tensor]) -> Iterator[None]:
        """Multiply the adapters' inputs by these factors, by the names of the linear layers."""
        for name, mask in masks.items():
            self._linear[name].factors = mask
        try:
            yield
        finally:
            for name in masks:
                self._linear[name].factors = None


class _Adapted(torch.nn.Module):
    """A linear layer in float32 with its adapter, if it has one."""

    def __init__(self, layer: Any, device: torch.device) -> None:
        super().__init__()
        base = base_of(layer)
        self._weight = full_weight(base).to(device).float()
        self._bias = None if base.bias is None else base.bias.detach().to(device).float()
        self.trained: list[torch.Tensor] = []
        self.factors: torch.Tensor | None = None
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            self._scale = float(layer.scaling[ADAPTER])
            pair = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            self.trained = [part.detach().to(device).float().clone().requires_grad_() for part in pair]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, self._weight, self._bias)
        if not self.trained:
            return y
        a, b = self.trained
        into = x if self.factors is None else x * self.factors
        return y + self._scale * (into @ a.T @ b.T)


def plain_loss(states: torch.Tensor, norm: LastNorm, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`label_log_probs` by PyTorch's own functions."""
    wide = states.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
    logits = (normed.to(norm.weight.dtype) * norm.weight).to(states.dtype) @ head.T
    if norm.softcap is not None:
        logits = norm.softcap * torch.tanh(logits / norm.softcap)
    chosen = torch.log_softmax(logits.float(), -1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return chosen * (labels >= 0)
