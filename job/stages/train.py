"""Stage train: download/model, prepare/train, prepare/eval → train/adapter, trainer_state.json, metrics.json, tensorboard.

Between its start and its end it writes checkpoints/checkpoint-STEP, which the supervisor stores and restores.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft.tuners.lora import Embedding as LoraEmbedding
from transformers import PreTrainedModel

from job.data.templates import load_tokenizer
from job.errors import InputError, Stopped, is_lost_contact
from job.hub.sources import public_name
from job.model.adapters import adapter_dtype, hold_adapter_in, lora_config
from job.model.attention import attention_of
from job.model.device import compute_dtype, device_of
from job.model.loading import load_base
from job.report.events import message, output
from job.report.goodput import first_step_text, speed_text, time_text
from job.run import Run, read_json, write_json
from job.stages.turn import await_turn
from job.training.arguments import allocator_retries, peak_memory_bytes, training_arguments
from job.training.best import KeepBest
from job.training.callbacks import (
    DecideSaves,
    OfferCheckpoints,
    RefuseNonsense,
    ReportProgress,
)
from job.training.execution import Execution
from job.training.launcher import unreachable
from job.training.pace import SavePace
from job.training.plan.choose import limit_memory
from job.training.sharding import weight_bytes
from job.training.trainer import AdapterTrainer


def train(run: Run) -> None:
    """Train the adapter, from the restored checkpoint if there is one; raises Stopped if a stop request came first."""
    live_tensorboard = run.paths.run_dir / "tensorboard"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(live_tensorboard)
    os.environ.setdefault("WANDB_DIR", str(run.paths.run_dir))
    await_turn(run, "prepare", "train")  # the base is here, and may be loaded while the data is prepared
    model = _load(run)
    await_turn(run, "train")
    checkpoint = _restored_checkpoint(run)
    trainer, stop = _build_trainer(run, model, checkpoint)
    started = time.monotonic()
    result = _train(trainer, checkpoint)
    if stop.stopped:
        raise Stopped(
            f"Stopped on request behind step {trainer.state.global_step}.", "Start the job again to go on from there."
        )
    if trainer.eval_dataset is not None and not _evaluated_at_the_end(trainer):
        trainer.evaluate()
    if trainer.best is not None:
        trainer.best.apply(trainer.model)
    _tidy_config(run, trainer)
    trainer.save_adapter(run.paths.adapter_dir)
    if run.node.is_first:
        _save(run, trainer, result.metrics, time.monotonic() - started)
        shutil.copytree(live_tensorboard, run.paths.tensorboard_dir, dirs_exist_ok=True)


def _train(trainer: AdapterTrainer, checkpoint: Path | None) -> Any:
    try:
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        if is_lost_contact(error):
            raise unreachable(error) from error
        raise
    return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _build_trainer(run: Run, model: PreTrainedModel, checkpoint: Path | None) -> tuple[AdapterTrainer, DecideSaves]:
    train_rows = _rows(run.paths.train_data_dir)
    eval_rows = _rows(run.paths.eval_data_dir) if run.paths.eval_data_dir.exists() else None
    max_length = int(read_json(run.paths.data_report_file)["max_length"])
    execution = Execution(run)
    pace = SavePace(run)
    stop = DecideSaves(run, pace)
    try:
        trainer = AdapterTrainer(
            model=model,
            execution=execution,
            args=training_arguments(
                run,
                max_length=max_length,
                evaluates=eval_rows is not None,
                resumed=checkpoint is not None,
                recomputes=execution.recomputes_by_library,
            ),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=load_tokenizer(run.paths.tokenizer_dir),
            peft_config=lora_config(run.settings),
            callbacks=[ReportProgress(), OfferCheckpoints(), stop, RefuseNonsense()],
            pace=pace,
            best=KeepBest(run.settings.early_stopping_patience) if run.settings.early_stopping_patience else None,
        )
    except ValueError as error:
        if "arget modules" in str(error) or "target_modules" in str(error):
            raise InputError(
                f"FT_LORA_TARGET_MODULES does not fit the model: {error}",
                "Use auto, all-linear, or names of its linear layers.",
            ) from error
        raise
    hold_adapter_in(trainer.model, adapter_dtype(run.settings, compute_dtype(run.settings, device_of(run))))
    if run.node.is_first:
        trainable, everything = trainer.model.get_nb_trainable_parameters()
        message(f"{trainable:,} of {everything:,} parameters are trained ({trainable / everything:.2%}).")
    execution.prepare(trainer.model, trainer.args)
    if run.settings.sharding == "full" and checkpoint is not None:
        trainer.load_adapter(checkpoint)  # while it is whole
    others = [name for name, module in trainer.model.named_modules() if isinstance(module, LoraEmbedding)]
    if others:
        raise InputError(f"FT_LORA_TARGET_MODULES names an embedding ({others[0]}).", "Name linear layers only.")
    return trainer, stop


def _rows(folder: Path) -> Dataset:
    rows = load_from_disk(folder)
    assert isinstance(rows, Dataset)
    return rows.with_format("numpy")  # of lists, trl's collator makes a batch ten times as slowly, and the GPU waits


def _load(run: Run) -> PreTrainedModel:
    """The base, as this training multiplies with it."""
    device = device_of(run)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit_memory(run.settings, device)
    return load_base(run, quantized=run.settings.use_4bit, attention=attention_of(run))


def _restored_checkpoint(run: Run) -> Path | None:
    """The one checkpoint that the supervisor restored and verified, if any."""
    folders = list(run.paths.checkpoints_dir.glob("checkpoint-*[0-9]"))
    return max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _evaluated_at_the_end(trainer: AdapterTrainer) -> bool:
    return any(
        "eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in trainer.state.log_history
    )


def _tidy_config(run: Run, trainer: AdapterTrainer) -> None:
    """The adapter's configuration without this machine's paths in it, and in an order that does not change."""
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path = public_name(run.settings.model_name)
        if isinstance(config.target_modules, set):  # written in another order by every process
            config.target_modules = sorted(config.target_modules)


def _save(run: Run, trainer: AdapterTrainer, result: dict[str, float], seconds: float) -> None:
    """The whole loss history; the figures for card and table."""
    paths, history = run.paths, trainer.state.log_history
    trainer.state.save_to_json(str(paths.trainer_state_file))
    metrics = _metrics(run, trainer, seconds) | {"train_loss_mean": result.get("train_loss")}
    write_json(paths.metrics_file, metrics)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    output("adapter", str(paths.adapter_dir))
    output("loss", f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "no step was logged")
    if (speed := speed_text(metrics["goodput"])) is not None:
        output("speed", speed)
    output("time", time_text(metrics["goodput"]))
    if (first_step := first_step_text(metrics["goodput"])) is not None:
        output("first step", first_step)
    if metrics["eval_loss_last"] is not None:
        output("evaluation loss", f"{metrics['eval_loss_first']:.4f} → {metrics['eval_loss_last']:.4f} nats a token")


def _matmul_flops(run: Run) -> float | None:
    """What preflight measured, if it did so on such a card; the folder may have been another machine's before."""
    device, file = device_of(run), run.paths.card_file
    if device.type != "cuda" or not file.is_file():
        return None
    card = read_json(file)
    return float(card["matmul_flops"]) if card["name"] == torch.cuda.get_device_name(device) else None


def _metrics(run: Run, trainer: AdapterTrainer, seconds: float) -> dict[str, Any]:
    history, device, kept = trainer.state.log_history, device_of(run), trainer.best
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
        "processes": run.node.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "weight_bytes": weight_bytes(trainer.model),
        "peak_memory_bytes": peak_memory_bytes(device),
        "allocator_retries": allocator_retries(device),
        "plan": trainer.execution.described(),
        "goodput": trainer.goodput.report(_matmul_flops(run)),
    }
