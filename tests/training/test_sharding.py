"""FT_SHARDING=full on two processes.

The 4-bit weights are sharded, the training is the same with dropout and gradient checkpointing, and checkpoints hold
whole tensors.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Job
from tests.nodes.test_nodes import Node
from tests.supervision.test_interruptions import resumed_step

TRAIN = Path("runs/test-run/train")


def metrics(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / TRAIN / "metrics.json").read_text(encoding="utf-8")))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / TRAIN / "adapter" / "adapter_model.safetensors"))


def test_sharded_4_bit_training_learns_what_whole_copies_learn_in_half_the_memory_and_resumes_exactly(
    job: Job, tmp_path: Path
) -> None:
    job.environment |= {
        "FT_STAGES": "train", "FT_TRAIN_ON": "all", "FT_NPROC_PER_NODE": "2", "FT_MAX_STEPS": "20", "FT_LEARNING_RATE": "1e-3", "FT_USE_NESTED_QUANT": "true",
        "FT_LORA_TARGET_MODULES": "all-linear", "FT_SAVE_STEPS": "1000", "FT_GRADIENT_CHECKPOINTING": "true",
    }  # fmt: skip
    folders = {name: tmp_path / name for name in ("whole", "straight", "stopped")}
    for name, sharding in (("whole", "none"), ("straight", "full")):
        result = job.run(FT_SHARDING=sharding, FT_OUTPUT_DIR=str(folders[name]))
        assert result.code == 0, result.stderr
    whole, straight = adapter(folders["whole"]), adapter(folders["straight"])
    assert whole.keys() == straight.keys()
    for name, values in whole.items():
        torch.testing.assert_close(straight[name], values, rtol=1e-4, atol=1e-6)
    held = metrics(folders["straight"])["weight_bytes"] / metrics(folders["whole"])["weight_bytes"]
    assert held == pytest.approx(0.5, abs=0.02)

    settings = {"FT_SHARDING": "full", "FT_OUTPUT_DIR": str(folders["stopped"])}
    node = Node(job.start(**settings))
    node.await_line('"done": 5,')
    node.process.send_signal(signal.SIGTERM)
    assert node.end(60).code == 75
    resumed = job.run(**settings)
    assert resumed.code == 0, resumed.stderr
    assert 5 <= resumed_step(resumed.events) < 20
    stopped = adapter(folders["stopped"])
    assert all(torch.equal(stopped[name], values) for name, values in straight.items())


def test_in_16_bits_the_loss_of_shards_equals_that_of_whole_copies(job: Job, tmp_path: Path) -> None:
    """Otherwise accelerate rounds what the model returns to bfloat16, and so the loss to three digits."""
    job.environment |= {
        "FT_STAGES": "train", "FT_NPROC_PER_NODE": "2", "FT_MAX_STEPS": "2", "FT_BNB_4BIT_COMPUTE_DTYPE": "bfloat16",
        "FT_LORA_DROPOUT": "0",
    }  # fmt: skip
    losses = []
    for sharding in ("none", "full"):
        result = job.run(FT_SHARDING=sharding, FT_OUTPUT_DIR=str(tmp_path / sharding))
        assert result.code == 0, result.stderr
        losses.append(
            [event["loss"] for event in result.events if event.get("event") == "progress" and "loss" in event]
        )
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
