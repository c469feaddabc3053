"""A training stopped and resumed again and again is bit-identical to one that was left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from job.errors import InputError, NodeError, Stopped
from job.run import Run
from job.stages.train import train
from job.training.callbacks import DecideSaves
from job.training.data_order import DataOrder
from job.training.state import load_tree, save_tree

STEPS = 10
_CLOCK = ("runtime", "per_second", "total_flos")  # log entries that differ between any two runs
MAKE = Callable[..., Run]

CASES = {
    "dropout and rows grouped by length": {"DATASET_SPLIT": "train[:24]"},
    "several epochs in random order": {"DATASET_SPLIT": "train[:14]", "GROUP_BY_LENGTH": "false"},
    "gradient accumulation over an uneven epoch": {"DATASET_SPLIT": "train[:30]", "GRADIENT_ACCUMULATION_STEPS": "2"},
    "packing": {"DATASET_SPLIT": "train[:200]", "PACKING": "true", "MAX_SEQ_LENGTH": "64", "TOO_LONG": "cut"},
    "two data workers": {
        "DATASET_SPLIT": "train[:24]",
        "EXTRA_TRAINING_ARGS": json.dumps({"dataloader_num_workers": 2}),
    },
    "evaluation on the way, points of the curve between saves": {
        "DATASET_SPLIT": "train[:30]",
        "EVAL_SPLIT": "0.2",
        "EVAL_STEPS": "3",
        "LOGGING_STEPS": "4",
    },
    "early stopping, with the best adapter kept": {
        "DATASET_SPLIT": "train[:30]",
        "EVAL_SPLIT": "0.2",
        "EVAL_STEPS": "1",
        "EARLY_STOPPING_PATIENCE": "8",
        "LEARNING_RATE": "0.2",
    },
    "fused layers, in parts, one of them recomputed": {
        "DATASET_SPLIT": "train[:24]",
        "DECODER_LAYERS": "fused",
        "PADDING_FREE": "true",
        "MICRO_BATCH_TOKENS": "120",
        "RECOMPUTED_LAYERS": "1",
    },
    "bfloat16 and a base that is not quantised": {
        "DATASET_SPLIT": "train[:24]",
        "BNB_4BIT_COMPUTE_DTYPE": "bfloat16",
        "BF16": "true",
        "USE_4BIT": "false",
    },
}


def train_with_stops(run: Run, monkeypatch: pytest.MonkeyPatch, *stops: int) -> None:
    """Train to the end in several starts, each but the last stopped after one of the steps `stops`."""
    real = DecideSaves.on_step_end

    def stop_there(self: DecideSaves, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == stop:
            run.paths.stop_file.write_text("9e9", encoding="utf-8")
        real(self, args, state, control, **kwargs)

    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(DecideSaves, "on_step_end", stop_there)
            with pytest.raises(Stopped, match=f"step {stop}"):
                train(run)
        run.paths.stop_file.unlink()
        keep_only(run, stop)
    train(run)


def keep_only(run: Run, step: int) -> None:
    for folder in run.paths.checkpoints_dir.iterdir():
        if folder.name != f"checkpoint-{step}":
            shutil.rmtree(folder)


def final_state(run: Run) -> dict[str, Any]:
    """The training's state at its end: adapter, optimizer, generators, row order, sums and loss history."""
    folder = run.paths.checkpoints_dir / f"checkpoint-{STEPS}"
    state: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
    }
    assert set(state) == {"adapter_model.safetensors", "optimizer.safetensors", "process-0.safetensors"}
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    state["history"] = [
        {name: value for name, value in entry.items() if not any(part in name for part in _CLOCK)} for entry in history
    ]
    state["result"] = hashlib.sha256((run.paths.adapter_dir / "adapter_model.safetensors").read_bytes()).hexdigest()
    metrics = json.loads(run.paths.metrics_file.read_text(encoding="utf-8"))
    return state | {
        name: metrics[name] for name in ("tokens", "loss_last", "eval_loss_last", "row_order_sha256", "train_loss_mean")
    }


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_four_times_is_bit_identical_to_one_left_alone(
    prepared: MAKE, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    settings = CASES[case]
    alone = prepared("alone", **settings)
    train(alone)
    expected = final_state(alone)
    stopped = prepared("stopped", **settings)
    train_with_stops(stopped, monkeypatch, 1, 4, 6, 9)
    assert final_state(stopped) == expected


def test_a_run_of_a_version_that_trained_in_bfloat16_goes_on_in_float32(
    prepared: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared("run", DATASET_SPLIT="train[:24]", BNB_4BIT_COMPUTE_DTYPE="bfloat16")
    stop, real = 4, DecideSaves.on_step_end

    def stop_there(self: DecideSaves, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == stop:
            run.paths.stop_file.write_text("9e9", encoding="utf-8")
        real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DecideSaves, "on_step_end", stop_there)
        with pytest.raises(Stopped):
            train(run)
    run.paths.stop_file.unlink()
    keep_only(run, stop)
    file = run.paths.checkpoints_dir / f"checkpoint-{stop}" / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    train(run)
    found = load_file(run.paths.adapter_dir / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values()), "updates are not rounded"


def test_the_control_that_drops_the_generators_is_detected(prepared: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("alone", DATASET_SPLIT="train[:24]")
    train_with_stops(run, monkeypatch)
    control = prepared("control", DATASET_SPLIT="train[:24]")
    from job.training.trainer import AdapterTrainer

    monkeypatch.setattr(AdapterTrainer, "_load_rng_state", lambda self, checkpoint: None)
    train_with_stops(control, monkeypatch, 4)
    assert final_state(control)["result"] != final_state(run)["result"]


def test_the_control_that_drops_the_data_position_is_detected(prepared: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job itself detects it first. With its check removed, the comparison above does."""
    run = prepared("alone", DATASET_SPLIT="train[:24]")
    train_with_stops(run, monkeypatch)
    control = prepared("control", DATASET_SPLIT="train[:24]")
    after_init = TrainingArguments.__post_init__

    def without_skipping(self: Any) -> None:
        after_init(self)
        self.ignore_data_skip = True

    monkeypatch.setattr(TrainingArguments, "__post_init__", without_skipping)
    with pytest.raises(InputError, match="are not in the order"):
        train_with_stops(control, monkeypatch, 4)
    monkeypatch.setattr(DataOrder, "_refuse_another_order", lambda self: None)
    train(control)
    assert final_state(control)["result"] != final_state(run)["result"]
    assert final_state(control)["row_order_sha256"] != final_state(run)["row_order_sha256"]


@pytest.mark.parametrize("rows", [20, 24], ids=["at the end of an epoch", "within an epoch"])
def test_a_training_killed_after_its_last_step_takes_no_further_step(prepared: MAKE, rows: int) -> None:
    run = prepared("alone", DATASET_SPLIT=f"train[:{rows}]")
    train(run)
    expected = final_state(run)
    shutil.rmtree(run.paths.stage_dir("train"))
    keep_only(run, STEPS)
    train(run)
    assert final_state(run) == expected


def test_a_different_number_of_processes_is_refused_before_a_step_is_taken(
    prepared: MAKE, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared("alone", DATASET_SPLIT="train[:24]")
    train_with_stops(run, monkeypatch, 4)
    keep_only(run, STEPS)
    folder = run.paths.checkpoints_dir / f"checkpoint-{STEPS}"
    shutil.copy(folder / "process-0.safetensors", folder / "process-1.safetensors")
    with pytest.raises(NodeError, match="started with 2 training processes, but now there are 1") as caught:
        train(run)
    assert caught.value.exit_code == 69


def test_a_checkpoint_holds_only_safetensors_and_json(prepared: MAKE, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared("alone", DATASET_SPLIT="train[:24]")
    train(run)
    names = {path.name for path in (run.paths.checkpoints_dir / f"checkpoint-{STEPS}").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "process-0.safetensors", "trainer_state.json",
    }  # fmt: skip
    state = load_tree(run.paths.checkpoints_dir / f"checkpoint-{STEPS}" / "process-0.safetensors")
    assert set(state) == {"processes", "generators", "data_order", "sums"}


_PICKLES = (
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin",
    "adapter_model.bin", "pytorch_model.bin", "model.safetensors", "tokenizer.pkl",
)  # fmt: skip


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def plant(path: Path, fired: Path, torch_format: bool) -> None:
    """Plant code that creates the file `fired` if anybody unpickles `path`."""
    import pickle

    import torch

    if torch_format:
        torch.save({"state": _Bomb(fired)}, path)
    else:
        path.write_bytes(pickle.dumps(_Bomb(fired)))


@pytest.mark.parametrize("torch_format", [True, False], ids=["torch.save", "pickle"])
def test_no_pickle_planted_in_a_checkpoint_is_ever_run(
    prepared: MAKE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_format: bool
) -> None:
    import torch

    fired = tmp_path / "fired"
    control = tmp_path / "control.pt"
    plant(control, fired, torch_format)
    torch.load(control, weights_only=False) if torch_format else __import__("pickle").loads(control.read_bytes())
    assert fired.exists()  # the bomb does go off
    fired.unlink()
    run = prepared("alone", DATASET_SPLIT="train[:24]")
    train_with_stops(run, monkeypatch, 4)
    keep_only(run, STEPS)
    folder = run.paths.checkpoints_dir / f"checkpoint-{STEPS}"
    for name in _PICKLES:  # next to the good files: none of these is read
        plant(folder / name, fired, torch_format)
    train(run)
    assert not fired.exists()
    for path in sorted(folder.glob("*")):  # in place of each file that is read
        if path.name in _PICKLES:
            continue
        good = path.read_bytes()
        plant(path, fired, torch_format)
        refused = False
        try:
            train(run)
        except Exception:  # what is raised depends on the file: all that counts is that nothing was run
            refused = True
        assert refused or path.name == "adapter_config.json", f"{path.name} was not read"
        assert not fired.exists(), path.name
        path.write_bytes(good)


def test_a_tree_comes_back_as_it_was_with_its_types(tmp_path: Path) -> None:
    import numpy as np
    import torch

    shared = torch.arange(4, dtype=torch.uint8)
    tree = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.full((2, 2), 0.5, dtype=torch.bfloat16), "same": [shared, shared]},
        "betas": (0.9, 0.999), "none": None, "flag": True, "nan": float("inf"), "numpy": np.arange(3, dtype=np.uint32), "list": [1, "a"],
    }  # fmt: skip
    save_tree(tree, tmp_path / "tree.safetensors")
    back = load_tree(tmp_path / "tree.safetensors")
    assert torch.equal(back[0]["exp_avg"], tree[0]["exp_avg"])
    assert back[0]["exp_avg"].dtype == torch.bfloat16
    assert torch.equal(back[0]["same"][1], shared)
    assert back["numpy"].dtype == np.uint32
    assert (back["numpy"] == tree["numpy"]).all()
    assert {name: back[name] for name in ("betas", "none", "flag", "nan", "list")} == {
        name: tree[name] for name in ("betas", "none", "flag", "nan", "list")
    }
    with pytest.raises(TypeError, match="cannot hold a function"):
        save_tree({"code": plant}, tmp_path / "code.safetensors")


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit"])
def test_a_bitsandbytes_optimizer_continues_from_a_saved_tree_as_if_never_saved(tmp_path: Path, name: str) -> None:
    import bitsandbytes
    import torch

    def steps(count: int, weight: Any, optimizer: Any) -> None:
        for number in range(count):
            weight.grad = torch.sin(weight.detach() * (number + 3))
            optimizer.step()

    torch.manual_seed(0)
    start = torch.randn(64, 128)
    alone = torch.nn.Parameter(start.clone())
    optimizer = getattr(bitsandbytes.optim, name)([alone], lr=1e-2)
    steps(3, alone, optimizer)
    save_tree({"optimizer": optimizer.state_dict()}, tmp_path / "optimizer.safetensors")
    resumed = torch.nn.Parameter(alone.detach().clone())
    again = getattr(bitsandbytes.optim, name)([resumed], lr=1.0)
    again.load_state_dict(load_tree(tmp_path / "optimizer.safetensors")["optimizer"])
    steps(3, alone, optimizer)
    steps(3, resumed, again)
    assert torch.equal(resumed, alone)
    assert not torch.equal(resumed, start)


def test_early_stopping_ends_when_evaluations_stop_improving_and_keeps_the_best_adapter(prepared: MAKE) -> None:
    from safetensors.torch import load_file

    settings = {"DATASET_SPLIT": "train[:30]", "EVAL_SPLIT": "0.2", "EVAL_STEPS": "1", "LEARNING_RATE": "0.5"}
    run = prepared("stopping", **settings, MAX_STEPS="40", SAVE_STEPS="1", EARLY_STOPPING_PATIENCE="2")
    train(run)
    metrics = json.loads(run.paths.metrics_file.read_text(encoding="utf-8"))
    history = json.loads(run.paths.trainer_state_file.read_text(encoding="utf-8"))["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert metrics["kept_step"] == best
    assert metrics["eval_loss_last"] == losses[best]
    assert metrics["steps"] == best + 2 < 40  # the learning rate is far too high, so the loss soon gets worse
    kept = load_file(run.paths.adapter_dir / "adapter_model.safetensors")
    there = load_file(run.paths.checkpoints_dir / f"checkpoint-{best}" / "adapter_model.safetensors")
    last = load_file(run.paths.checkpoints_dir / f"checkpoint-{best + 2}" / "adapter_model.safetensors")
    assert all((kept[name] == there[name]).all() for name in kept)
    assert not all((kept[name] == last[name]).all() for name in kept)
    shutil.rmtree(run.paths.stage_dir("train"))
    keep_only(run, best + 2)
    train(run)  # killed after its last step: it is over, and reports the same
    assert json.loads(run.paths.metrics_file.read_text(encoding="utf-8"))["steps"] == best + 2
