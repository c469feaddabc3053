"""Stage train: download/model, prepare/train, prepare/eval → train/adapter, trainer_state.json, metrics.json, tensorboard.

While it runs it writes checkpoints/checkpoint-STEP, which the supervisor stores and restores.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from peft.tuners.lora import Embedding as LoraEmbedding
from transformers import PreTrainedModel

from job.data.templates import load_tokenizer, new_token_ids
from job.environment.adapter_settings import with_adapters_own
from job.environment.local_files import public_name
from job.environment.model_settings import refuse_unfit
from job.errors import InputError, Stopped, is_lost_contact
from job.model.adapters import ADAPTERS_HINT, hold_adapter_in_float32, lora_config
from job.model.architectures import default_targets
from job.model.compute import Compute
from job.model.loading import load_base
from job.model.vocabulary import give_heads_a_bias, grow, trained_rows
from job.report.events import decided, message, output
from job.report.goodput import first_step_text, speed_text, time_text
from job.run import Run, read_json, write_json
from job.stages.turn import await_turn
from job.training.arguments import training_arguments
from job.training.best import KeepBest
from job.training.callbacks import DecideSaves, LogShortRuns, OfferCheckpoints, RefuseNonsense, ReportProgress
from job.training.choice import Choice, choose_steps, limit_memory
from job.training.execution import Execution
from job.training.launcher import unreachable
from job.training.network import listen_to_nccl, tell_network
from job.training.pace import SavePace
from job.training.ranks import join
from job.training.results import evaluated_at_the_end, summarized, untrained
from job.training.trainer import AdapterTrainer


def train(run: Run) -> None:
    """Train the adapter, from the restored checkpoint if there is one. Raises Stopped after a stop request."""
    live_tensorboard = run.paths.run_dir / "tensorboard"
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(live_tensorboard)
    os.environ.setdefault("WANDB_DIR", str(run.paths.run_dir))
    await_turn(run, "prepare", "train")  # the base model is here by now, and loads while the data is prepared
    config = read_json(run.paths.model_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    if run.settings.adapter_name is not None:
        own = with_adapters_own(run.settings, read_json(run.paths.earlier_adapter_dir / "adapter_config.json"))
        run = dataclasses.replace(run, settings=own)
    if run.takes_over:
        await_turn(run, "train")  # before it, the supervisor may still clear the stage's folder
        _take_over(run)
        return
    if compute.on_gpu:
        torch.cuda.set_device(compute.device)
    _meet(run, compute)
    model = _load(run, compute)
    await_turn(run, "train")
    choice = choose_steps(run.settings, compute, config, read_json(run.paths.data_report_file))
    if choice.reason is not None and run.node.is_first:
        message(choice.reason, "warning" if choice.slower else "info")
    checkpoint = _restored_checkpoint(run.paths.checkpoints_dir)
    trainer, stop = _build_trainer(run, model, choice, checkpoint)
    if compute.on_gpu and run.node.is_first:
        decided(compute_dtype=str(compute.dtype).removeprefix("torch."))
    started = time.monotonic()
    result = _train(trainer, checkpoint)
    if trainer.eval_dataset is not None and not stop.stopped and not evaluated_at_the_end(trainer):
        trainer.evaluate_at_the_end()
    if stop.stopped:
        raise Stopped(
            f"Stopped after step {trainer.state.global_step}, as requested.",
            "Start the job again to resume from there.",
        )
    if trainer.best is not None:
        trainer.best.apply(trainer.model)
    _tidy_config(run, trainer)
    trainer.save_adapter(run.paths.adapter_dir)
    if run.node.is_first:
        metrics = summarized(
            trainer, compute,
            seconds=time.monotonic() - started, train_loss=result.metrics.get("train_loss"),
            matmul_flops=_matmul_flops(compute, run.paths.card_file),
        )  # fmt: skip
        write_json(run.paths.metrics_file, metrics)
        trainer.state.save_to_json(str(run.paths.trainer_state_file))
        shutil.copytree(live_tensorboard, run.paths.tensorboard_dir, dirs_exist_ok=True)
        _report(metrics, run.paths.adapter_dir)


def _take_over(run: Run) -> None:
    """Put the adapter of FT_ADAPTER_NAME where training would have put its own."""
    if not run.node.is_first:
        return
    run.paths.adapter_dir.mkdir(parents=True, exist_ok=True)
    config = read_json(run.paths.earlier_adapter_dir / "adapter_config.json")
    config["base_model_name_or_path"], config["revision"] = base_of(run)
    write_json(run.paths.adapter_dir / "adapter_config.json", config)
    shutil.copyfile(
        run.paths.earlier_adapter_dir / "adapter_model.safetensors", run.paths.adapter_dir / "adapter_model.safetensors"
    )
    write_json(run.paths.trainer_state_file, {"log_history": []})
    write_json(run.paths.metrics_file, untrained())
    output("adapter", str(run.paths.adapter_dir))


def _meet(run: Run, compute: Compute) -> None:
    try:
        if run.node.count > 1:
            listen_to_nccl(run.paths.run_dir / "network")
        join(run.node, on_gpu=compute.on_gpu, sharded=run.settings.sharding != "none")
        if run.node.count > 1 and run.node.world_size > 1:
            tell_network(run.node, compute.device, run.paths.run_dir / "network")
    except Exception as error:
        if is_lost_contact(error):
            raise unreachable(error) from error
        raise


def _load(run: Run, compute: Compute) -> PreTrainedModel:
    """The base model, as training computes with it."""
    limit_memory(run.settings, compute.device)
    return load_base(
        run.paths.model_dir, run.settings, compute, quantized=run.settings.use_4bit, attention=compute.attention
    )


def _build_trainer(
    run: Run, model: PreTrainedModel, choice: Choice, checkpoint: Path | None
) -> tuple[AdapterTrainer, DecideSaves]:
    """The trainer, with the adapter in the model and the chosen layers."""
    settings, compute = run.settings, choice.compute
    refuse_unfit(settings, model.config.get_text_config().to_dict())
    tokenizer = load_tokenizer(run.paths.tokenizer_dir)
    new = new_token_ids(tokenizer, settings.new_tokens)
    grow(model, max(new, default=-1) + 1)
    train_rows = _rows(run.paths.train_data_dir)
    eval_rows = _rows(run.paths.eval_data_dir) if run.paths.eval_data_dir.exists() else None
    max_length = int(read_json(run.paths.data_report_file)["max_length"])
    evaluated_tokens = settings.per_device_eval_batch_size * max_length if eval_rows is not None else 0
    execution = Execution(settings, choice, rank=run.node.rank, evaluated_tokens=evaluated_tokens)
    pace = SavePace(run.paths.upload_timing_file)
    stop = DecideSaves(pace, run.stop_deadline, paced=settings.save_steps == "auto")
    arguments = training_arguments(
        settings, compute,
        output_dir=run.paths.checkpoints_dir, run_name=run.id, max_length=max_length, evaluates=eval_rows is not None,
        resumed=checkpoint is not None, recomputes=execution.recomputes_by_library,
    )  # fmt: skip
    try:
        trainer = AdapterTrainer(
            model=model,
            execution=execution,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=lora_config(settings, trained_rows(model, new), default_targets(model.config.to_dict())),
            callbacks=[LogShortRuns(), ReportProgress(), OfferCheckpoints(pace), RefuseNonsense()],
            pace=pace,
            stop=stop,
            best=KeepBest(settings.early_stopping_patience) if settings.early_stopping_patience else None,
        )
    except ValueError as error:
        if "arget modules" in str(error) or "target_modules" in str(error):
            known = (
                "=auto knows no layers of this kind of model"
                if settings.lora_target_modules == "auto"
                else " does not fit the model"
            )
            raise InputError(
                f"FT_LORA_TARGET_MODULES{known}: {error}",
                "Set it to all-linear, or to names of linear layers such as q_proj,v_proj.",
            ) from error
        raise
    give_heads_a_bias(trainer.model)
    hold_adapter_in_float32(trainer.model)
    if run.node.is_first:
        trainable, everything = trainer.model.get_nb_trainable_parameters()
        message(f"{trainable:,} of {everything:,} parameters are trained ({trainable / everything:.2%}).")
    if settings.adapter_name is not None and checkpoint is None:
        trainer.load_adapter(run.paths.earlier_adapter_dir, f"FT_ADAPTER_NAME={settings.adapter_name}: {ADAPTERS_HINT}")
        if run.node.is_first:
            message(f"Going on from the adapter of {public_name(settings.adapter_name)}.")
    execution.prepare(trainer.model, trainer.args)
    if settings.sharding == "full" and checkpoint is not None:
        trainer.load_adapter(checkpoint)  # before it is sharded
    others = [name for name, module in trainer.model.named_modules() if isinstance(module, LoraEmbedding)]
    if others:
        raise InputError(f"FT_LORA_TARGET_MODULES names an embedding ({others[0]}).", "Name linear layers only.")
    return trainer, stop


def _train(trainer: AdapterTrainer, checkpoint: Path | None) -> Any:
    try:
        trainer.accelerator.wait_for_everyone()
    except Exception as error:
        if is_lost_contact(error):
            raise unreachable(error) from error
        raise
    return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _rows(folder: Path) -> Dataset:
    rows = load_from_disk(folder)
    assert isinstance(rows, Dataset)
    return rows.with_format("numpy")  # with lists, TRL's collator takes ten times as long, and the GPU waits for it


def _restored_checkpoint(checkpoints_dir: Path) -> Path | None:
    """The one checkpoint that the supervisor restored and verified, if any."""
    folders = list(checkpoints_dir.glob("checkpoint-*[0-9]"))
    return max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _tidy_config(run: Run, trainer: AdapterTrainer) -> None:
    """Keep this machine's paths out of the adapter's configuration, and sort its lists."""
    for config in trainer.model.peft_config.values():
        config.base_model_name_or_path, config.revision = base_of(run)
        if isinstance(config.target_modules, set):  # each process would write it in a different order
            config.target_modules = sorted(config.target_modules)


def base_of(run: Run) -> tuple[str, str | None]:
    """The base model as an adapter names it, so that peft loads the right one: its Hub id, and its commit there."""
    sources = read_json(run.paths.sources_file) if run.paths.sources_file.is_file() else {}
    source = sources.get("FT_MODEL_NAME", {})
    if source.get("kind") != "hub":
        return public_name(run.settings.model_name), None
    return source["source"], source["commit"]


def _matmul_flops(compute: Compute, card_file: Path) -> float | None:
    """What preflight measured, or None if that was another kind of card: the folder may come from another machine."""
    if not compute.on_gpu or not card_file.is_file():
        return None
    card = read_json(card_file)
    return float(card["matmul_flops"]) if card["name"] == torch.cuda.get_device_name(compute.device) else None


def _report(metrics: dict[str, Any], adapter_dir: Path) -> None:
    """Report the figures for the closing table."""
    first, last, goodput = metrics["loss_first"], metrics["loss_last"], metrics["goodput"]
    output("adapter", str(adapter_dir))
    if first is None:
        output("loss", "no step was logged")
    else:
        output("loss", f"{first:.4f} → {last:.4f}", loss_first=first, loss_last=last)
    if (speed := speed_text(goodput)) is not None:
        output("speed", speed)
    output("time", time_text(goodput))
    if (first_step := first_step_text(goodput)) is not None:
        output("first step", first_step)
    if metrics["eval_loss_last"] is not None:
        before, after = metrics["eval_loss_first"], metrics["eval_loss_last"]
        told = f"{before:.4f} → {after:.4f} nats/token"
        output("evaluation loss", told, eval_loss_first=before, eval_loss_last=after)
