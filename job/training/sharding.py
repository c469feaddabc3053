"""FSDP2: each process holds a slice of every weight (Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`).

The 4-bit weights are sharded too (Answer.AI 2024, "FSDP+QLoRA"). They are stored as the same bytes in a floating type,
since only floating types can be sharded. Their quantization constants are not sharded: every GPU holds all of them.
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
    """FT_SHARDING as arguments of transformers' trainer. Each decoder layer is gathered when it is used.

    Gradient checkpointing is transformers' own. accelerate's would gather each layer once less, but does not restore
    the generator (accelerate 1.15). Dropout would then differ between the two forward passes, and gradients would be
    wrong.
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
    """Let accelerate shard between processes on the CPU, which it supports for GPUs only. The tests need it."""
    if arguments.fsdp_plugin_args is None or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_loss_exact(accelerator: Accelerator) -> None:
    """Cast only the weights to 16 bits, not the modules' outputs or the gradients.

    accelerate would also cast what modules return, which leaves the loss three digits, and sum the processes' gradients
    in 16 bits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def whole(value: Any) -> Any:
    """Gather all shards in nested dicts, lists and tuples, and keep anything else. All processes must call this."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def weight_bytes(model: torch.nn.Module) -> int:
    """The bytes of the weights that this process holds between computations, when nothing is gathered."""
    own = (value.to_local() if isinstance(value, DTensor) else value for value in model.parameters())
    return sum(value.numel() * value.element_size() for value in own)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part of an unsharded optimizer's `state`: every moment is sliced like its parameter."""
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
