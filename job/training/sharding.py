"""FSDP2: each process holds a slice of every weight (Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`).

The 4-bit weights are sharded too (Answer.AI 2024, "FSDP+QLoRA"): they are stored in a floating type of the same bytes,
since only such a type can be a shard. Their quantisation constants stay whole on every GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from job.settings import Settings


def sharding_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of transformers' trainer that FT_SHARDING stands for; each decoder layer is gathered when it is used.

    Activations are recomputed by transformers' own checkpointing. accelerate's, which would gather a layer once less, does
    not restore the generator (accelerate 1.15): dropout would differ between the two, and the gradients be wrong.
    """
    if settings.sharding == "none":
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": False,
        },
    }


def allow_on_cpu(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Let accelerate shard between processes on the CPU, which it offers for GPUs only: it is how sharding is tested."""
    if arguments.fsdp_plugin_args is None or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_loss_exact(accelerator: Accelerator) -> None:
    """Cast weights for the products only: accelerate would give the loss three digits, as what a module returns, and sum
    the processes' gradients in 16 bits."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def whole(value: Any) -> Any:
    """A tensor that is a shard, gathered from all processes, which must all call this; anything else as it is."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def weight_bytes(model: torch.nn.Module) -> int:
    """The bytes of the weights that this process holds while it computes nothing."""
    own = (value.to_local() if isinstance(value, DTensor) else value for value in model.parameters())
    return sum(value.numel() * value.element_size() for value in own)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """`state`, a whole optimizer's, as this process's part of it: every moment sliced as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sliced = {
        index: {name: _slice_like(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    return {**state, "state": sliced}


def _slice_like(value: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
