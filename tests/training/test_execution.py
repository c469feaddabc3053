"""Plans in action: micro-batches, gradient checkpointing, and running out of memory in the middle of a step."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from job.errors import InputError, NodeError
from job.model.fused import pointwise
from job.model.fused.layer import FusedLayer
from job.model.fused.products import Normed, Products
from job.model.fused.proof import Proof
from job.model.patches import Patches
from job.run import Run, read_json
from job.stages.train import train
from job.training.choice import Choice, choose_steps, free_bytes
from job.training.execution import Execution, _parts, switch_mode_only_if_another
from job.training.optimizer import at_once
from job.training.plan.candidates import Plan
from job.training.plan.load import Shape
from tests.conftest import Job, compute_of

Prepared = Callable[..., Run]
FUSED = {"DATASET_SPLIT": "train[:40]", "DECODER_LAYERS": "fused", "PADDING_FREE": "true", "MAX_STEPS": "6"}


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.paths.adapter_dir) / "adapter_model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = float((found[name] - value).norm() / value.norm())
        assert difference <= relative, f"{name}: {difference}"


@pytest.mark.parametrize("accumulated", ["1", "2"])
def test_fused_layers_train_what_plain_ones_train(prepared: Prepared, accumulated: str) -> None:
    common = {"LORA_DROPOUT": "0", "EVAL_SPLIT": "0.2", "GRADIENT_ACCUMULATION_STEPS": accumulated}
    plain = prepared("plain", **{**FUSED, **common, "DECODER_LAYERS": "plain", "PADDING_FREE": "false"})
    train(plain)
    whole, parts = prepared("whole", **FUSED, **common), prepared("parts", **FUSED, **common, MICRO_BATCH_TOKENS="100")
    train(whole)
    train(parts)
    assert_equal(adapter(whole), adapter(plain), 1e-3)
    assert_equal(adapter(parts), adapter(whole), 1e-3)
    histories = [read_json(run.paths.trainer_state_file)["log_history"] for run in (plain, whole, parts)]
    for name in ("loss", "eval_loss", "num_tokens", "entropy", "mean_token_accuracy", "grad_norm"):
        values = [[entry[name] for entry in history if name in entry] for history in histories]
        assert values[0]
        for other in values[1:]:
            assert other == pytest.approx(values[0], rel=1e-4)
    assert read_json(parts.paths.metrics_file)["plan"]["micro_batch_tokens"] == 100


def test_a_step_reads_nothing_from_the_gpu_and_the_log_has_every_figure(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    for name in ("item", "__bool__", "__float__", "__int__", "cpu"):  # each waits for a GPU
        _tell_callers(monkeypatch, name, asked)
    run = prepared("run", **{**FUSED, "LOGGING_STEPS": "3"})
    train(run)
    assert "training_step" not in asked
    assert "read_figures" in asked, "the spy works"
    entries = [entry for entry in read_json(run.paths.trainer_state_file)["log_history"] if "entropy" in entry]
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:
        assert 0 <= entry["mean_token_accuracy"] <= 1
        assert entry["entropy"] > 0
        assert isinstance(entry["num_tokens"], int | float)


def _tell_callers(monkeypatch: pytest.MonkeyPatch, name: str, told: set[str]) -> None:
    plain = getattr(torch.Tensor, name)

    def telling(self: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        told.update(frame.f_code.co_name for frame, _ in traceback.walk_stack(None))
        return plain(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, name, telling)


def test_a_model_switches_mode_as_a_whole_and_only_when_the_mode_changes() -> None:
    inner = torch.nn.Dropout()
    model = torch.nn.Sequential(inner)
    inner.eval()  # as a model loaded inside an adapter is
    switch_mode_only_if_another(model, Patches())
    model.train()
    assert inner.training
    model.eval()
    assert not inner.training
    model.train()
    assert inner.training
    visited: list[bool] = []
    inner.train = visited.append  # type: ignore[assignment]
    model.train()
    assert not visited
    model.eval()
    assert visited == [False]


def test_parts_drop_what_the_whole_batch_drops(prepared: Prepared) -> None:
    whole, parts = prepared("whole", **FUSED), prepared("parts", **FUSED, MICRO_BATCH_TOKENS="100")
    train(whole)
    train(parts)
    assert_equal(adapter(parts), adapter(whole), 1e-3)


def test_recomputing_changes_nothing(prepared: Prepared) -> None:
    runs = [prepared(f"recomputed-{count}", **FUSED, RECOMPUTED_LAYERS=count) for count in ("0", "1", "2")]
    for run in runs:
        train(run)
    for run in runs[1:]:
        assert_equal(adapter(run), adapter(runs[0]))


@pytest.mark.parametrize("accumulated", ["1", "2"])
def test_running_out_of_memory_in_the_middle_of_a_step_costs_nothing_but_time(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, accumulated: str
) -> None:
    """The step is retried with a smaller plan, and the run ends as if it had been planned so from the start."""
    straight = prepared("straight", **FUSED, RECOMPUTED_LAYERS="2", GRADIENT_ACCUMULATION_STEPS=accumulated)
    train(straight)
    run = prepared("full", **FUSED, RECOMPUTED_LAYERS="0", GRADIENT_ACCUMULATION_STEPS=accumulated)
    backward, passes = FusedLayer.backward_, [0]

    def full(self: FusedLayer, *arguments: Any, **named: Any) -> Any:
        passes[0] += 1
        if self.kept and passes[0] > 7:  # after the last layer's gradients of some step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(self, *arguments, **named)

    monkeypatch.setattr(FusedLayer, "backward_", full)
    train(run)
    assert_equal(adapter(run), adapter(straight))
    assert read_json(run.paths.metrics_file)["plan"]["recomputed"] == 2
    tokens = [read_json(each.paths.metrics_file)["tokens"] for each in (run, straight)]
    assert tokens[0] == tokens[1]


def test_too_little_memory_for_any_plan_ends_the_training(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FusedLayer, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FusedLayer, "backward_", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(prepared("full", **FUSED))


def test_a_model_that_the_fused_layers_do_not_support_is_refused_if_they_are_requested(
    prepared: Prepared,
) -> None:
    run = prepared("other", **FUSED)
    config = {**read_json(run.paths.model_dir / "config.json"), "attention_dropout": 0.1}
    with pytest.raises(InputError, match=r"they do not support the model's attention_dropout=0\.1"):
        choose_steps(run.settings, compute_of(run), config, read_json(run.paths.data_report_file))


@pytest.mark.parametrize("broken", ["crashes", "values", "gradient", "adapter", "many tokens"])
def test_a_layer_with_wrong_results_on_this_machine_is_computed_the_plain_way(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    plain = prepared("plain", **{**FUSED, "DECODER_LAYERS": "plain"})
    train(plain)
    run = prepared("broken", **FUSED)
    gated, backward = pointwise.gated, pointwise.gated_backward_

    def wrong(gate_up: torch.Tensor, out: torch.Tensor, rounded: Any = None, **named: Any) -> torch.Tensor:
        if broken == "crashes":
            raise RuntimeError("no kernel image is available")
        result = gated(gate_up, out, rounded, **named)
        return result if broken == "many tokens" and len(gate_up) < 4096 else result.mul_(1.3)

    def wrong_gradient(gradient: torch.Tensor, gate_up_: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        act = backward(gradient, gate_up_, *others, **named)
        gate_up_ *= 1.5
        return act

    if broken == "gradient":
        monkeypatch.setattr(pointwise, "gated_backward_", wrong_gradient)
    elif broken == "adapter":
        products = Normed.products
        monkeypatch.setattr(Normed, "products", lambda self, other: products(self, other) * 2)
    else:
        if broken == "many tokens":
            monkeypatch.setattr("job.training.execution.MANY_TOKENS", 1)
        monkeypatch.setattr(pointwise, "gated", wrong)
    reason = "RuntimeError: no kernel image" if broken == "crashes" else "a kept layer: .* differs by"
    with pytest.raises(NodeError, match=f"do not give what the model's own layers give on this machine: {reason}"):
        train(run)
    monkeypatch.setattr("job.training.execution.is_asked_for", lambda settings: False)
    monkeypatch.setattr("job.stages.train.choose_steps", _chosen_as_on_a_gpu)
    train(run)
    assert "The layers are computed by transformers and peft, which is slower" in capsys.readouterr().out
    assert_equal(adapter(run), adapter(plain))
    assert read_json(run.paths.metrics_file)["plan"] is None


def test_a_proof_that_needs_too_much_memory_is_tried_again_with_less(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = prepared("plain", **FUSED)
    train(plain)
    given: list[float] = []

    class Full(Proof):
        def __init__(self, *arguments: Any, free_bytes: float, **named: Any) -> None:
            given.append(free_bytes)
            super().__init__(*arguments, free_bytes=free_bytes, **named)

        def failure(self, *arguments: Any, **named: Any) -> str | None:
            found = super().failure(*arguments, **named)
            if len(given) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return found

    monkeypatch.setattr("job.training.execution.Proof", Full)
    run = prepared("full", **FUSED)
    train(run)
    assert given == [float("inf"), 0.0]
    assert_equal(adapter(run), adapter(plain))
    assert read_json(run.paths.metrics_file)["plan"] is not None


def test_8_bit_layers_are_proved_in_16_bits_first_where_their_roundings_hide_nothing(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "job.stages.train.choose_steps",
        lambda settings, compute, config, report: Choice(compute, Shape.of(config, settings), Plan("fp8", 0, 4096, 1)),
    )
    run = prepared("right", **FUSED)
    train(run)
    assert read_json(run.paths.metrics_file)["plan"]["weights"] == "fp8"
    of_b = Products.of_b
    monkeypatch.setattr(Products, "of_b", lambda self, *others: [part * 1.15 for part in of_b(self, *others)])
    with pytest.raises(NodeError, match=r"gradient \d+ of its adapters differs by 15"):
        train(prepared("wrong", **FUSED))


def test_a_checkpoint_whose_layers_are_held_in_different_ways_is_trained_by_plain_layers(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some checkpoints in 4 bits leave single layers in 16, which no config.json says in a form to rely on."""
    plain = prepared("plain", **{**FUSED, "DECODER_LAYERS": "plain"})
    train(plain)
    run = prepared("mixed", **FUSED)
    monkeypatch.setattr("job.training.execution.can_fuse", lambda *_: False)
    with pytest.raises(InputError, match=r"not those that its config\.json describes"):
        train(run)
    monkeypatch.setattr("job.training.execution.is_asked_for", lambda settings: False)
    monkeypatch.setattr("job.stages.train.choose_steps", _chosen_as_on_a_gpu)
    train(run)
    assert "The layers are computed by transformers and peft, which is slower" in capsys.readouterr().out
    assert_equal(adapter(run), adapter(plain))


_FAULT = """
import builtins, os, sys
real = builtins.__import__

def gated(*arguments, **named):
    raise RuntimeError("CUDA error: an illegal instruction was encountered")

def patched(name, *rest, **named):
    module = real(name, *rest, **named)
    execution = sys.modules.get("job.training.execution")
    if execution is not None and hasattr(execution, "with_less_memory") and execution.is_alive is not dead:
        execution.is_alive = dead  # first, since the next line comes here again
        from job.model.fused import pointwise, proof
        pointwise.gated = gated
        from job.training import choice
        choice.is_asked_for = lambda settings: not choice.without_kernels()
    return module

def dead(device):
    return False

builtins.__import__ = patched
"""


def test_a_training_killed_by_a_kernel_fault_starts_again_without_kernels(job: Job, tmp_path: Path) -> None:
    """After an asynchronous fault the GPU no longer responds, so nothing can be compared. The CPU simulates it."""
    (tmp_path / "sitecustomize.py").write_text(_FAULT, encoding="utf-8")
    job.environment |= {
        "FT_STAGES": "train",
        "FT_PADDING_FREE": "true",
        "FT_MAX_STEPS": "2",
        "PYTHONPATH": str(tmp_path),
    }
    result = job.run()
    assert result.code == 0, result.stderr
    warnings = [event["message"] for event in result.events if event["level"] == "warning"]
    (told,) = [text for text in warnings if "Starting the training again" in text]
    assert "illegal instruction" in told and "without the job's own kernels" in told
    trained = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "train"
    metrics = read_json(trained / "metrics.json")
    assert metrics["plan"] is None
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()


def test_without_kernels_nothing_is_planned_and_the_optimizer_is_bitsandbytes_own(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared("run", **FUSED)
    assert chosen(run).plan is not None
    monkeypatch.setenv("JOB_WITHOUT_KERNELS", "1")
    with pytest.raises(
        InputError, match=r"=fused is not possible\. .* cannot be used here: one of the job's own kernels crashed"
    ):
        chosen(run)  # the settings ask for fused layers
    monkeypatch.setattr("job.training.choice.is_asked_for", lambda settings: False)
    assert chosen(run).plan is None
    assert at_once(bnb.optim.AdamW, {"optim_bits": 32}, torch.device("cuda", 0)) is bnb.optim.AdamW


def test_kernels_for_many_tokens_are_checked_if_a_row_or_an_evaluation_has_many(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared("rows", **FUSED)
    checked: list[bool] = []

    class Watched(Proof):
        def __init__(self, *arguments: Any, many: bool, **named: Any) -> None:
            checked.append(many)
            raise RuntimeError("seen")

    monkeypatch.setattr("job.training.execution.Proof", Watched)
    decoder = chosen(run).shape.decoder
    for tokens, longest, evaluated, many in (
        (64, 32, 0, False), (4096, 32, 0, True), (64, 4096, 0, True), (64, 32, 4096, True),
    ):  # fmt: skip
        checked.clear()
        Execution(run.settings, Choice(compute_of(run)), evaluated_tokens=evaluated)._fuse(
            torch.nn.Module(), Plan("4-bit", 0, tokens, 1, longest_row=longest), decoder
        )
        assert checked == [many], (tokens, longest, evaluated)


def chosen(run: Run) -> Choice:
    config = read_json(run.paths.model_dir / "config.json")
    return choose_steps(run.settings, compute_of(run), config, read_json(run.paths.data_report_file))


def _chosen_as_on_a_gpu(settings: Any, compute: Any, config: Any, data_report: Any) -> Choice:
    return Choice(compute, Shape.of(config, settings), Plan("4-bit", 0, 4096, 1))


@pytest.mark.parametrize(
    ("lengths", "most", "parts"),
    [
        ([5, 5, 5, 5], 10, [2, 2]),
        ([5, 5, 5, 5], 9, [1, 1, 1, 1]),
        ([20, 1, 1], 10, [1, 2]),
        ([1, 1, 20], 10, [2, 1]),
        ([3], 10, [1]),
    ],
)
def test_parts_hold_whole_rows_and_no_more_tokens_than_allowed(lengths: list[int], most: int, parts: list[int]) -> None:
    boundaries = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    found = list(_parts(boundaries, most))
    assert [end - begin for begin, end in found] == parts
    assert [row for begin, end in found for row in range(begin, end)] == list(range(len(lengths)))


def test_gpu_memory_that_this_process_already_holds_is_free_for_its_plan(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights may be loaded before the plan is made."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    assert free_bytes(make_run().settings, torch.device("cuda")) == 57
    assert free_bytes(make_run(GPU_MEMORY_GIB=str(40 / 2**30)).settings, torch.device("cuda")) == pytest.approx(40)
