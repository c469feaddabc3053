"""The figures of a finished training for the model card, the closing table and `metrics.json`."""

from __future__ import annotations

from typing import Any

import torch

from job.model.compute import Compute
from job.training.arguments import allocator_retries, peak_memory_bytes
from job.training.sharding import weight_bytes
from job.training.trainer import AdapterTrainer


def summarized(
    trainer: AdapterTrainer, compute: Compute, *, seconds: float, train_loss: float | None, matmul_flops: float | None
) -> dict[str, Any]:
    """The figures: losses in nats/token, memory in bytes, and times in seconds of this start.

    `matmul_flops` is the rate of large products that preflight measured on this card, or None if it was not measured.
    """
    history, kept, device = trainer.state.log_history, trainer.best, compute.device
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry and "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_loss_first": evaluations[0] if evaluations else None,
        "eval_loss_last": kept.loss if kept else evaluations[-1] if evaluations else None,
        "kept_step": kept.step if kept else trainer.state.global_step,
        "tokens": tokens[-1] if tokens else None,
        "row_order_sha256": trainer.data_order.digest(),
        "seconds_of_this_start": round(seconds, 1),
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name(device) if compute.on_gpu else "CPU",
        "weight_bytes": weight_bytes(trainer.model),
        "peak_memory_bytes": peak_memory_bytes(device),
        "allocator_retries": allocator_retries(device),
        "plan": trainer.execution.described(),
        "goodput": trainer.goodput.report(matmul_flops),
        "train_loss_mean": train_loss,
    }


def untrained() -> dict[str, Any]:
    """The figures of an adapter that this run did not train."""
    nothing = dict.fromkeys(
        ("loss_first", "loss_last", "eval_loss_first", "eval_loss_last", "tokens", "peak_memory_bytes")
    )
    return {"steps": 0, "epochs": 0.0, "kept_step": 0, "processes": 0, "device": "none", **nothing}


def evaluated_at_the_end(trainer: AdapterTrainer) -> bool:
    """Whether an evaluation after the last step has been logged."""
    return any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    )
