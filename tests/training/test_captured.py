"""Captured passes on the CPU, where a recorder computes the pass again on its fixed places instead of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from job.model.fused.layer import FusedLayer
from job.run import Run, read_json
from job.stages.train import train
from job.training import captured
from job.training.captured import CapturedPasses, Result, filled
from job.training.execution import Execution
from job.training.gradients import FlatGradients, Gradients
from tests.training.test_execution import FUSED, adapter, assert_equal

Prepared = Callable[..., Run]


class Again:
    """Computes a recorded pass again at each launch, and writes the results where those of the recording were."""

    launches: list[int]

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, compute: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        result = Result(torch.zeros(()), torch.zeros(3, dtype=torch.float64))

        def launch() -> None:
            Again.launches.append(1)
            for place, found in zip(result, compute(), strict=True):
                place.copy_(found)

        return launch, result


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> type[Again]:
    monkeypatch.setattr(captured, "OnGpu", Again)
    monkeypatch.setattr("job.training.choice.can_capture", lambda device: True)
    Again.launches = []
    return Again


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"LORA_DROPOUT": "0", "GRADIENT_ACCUMULATION_STEPS": "2"},
        {"MICRO_BATCH_TOKENS": "100", "GRADIENT_ACCUMULATION_STEPS": "2"},
        {"RESIDENT_WEIGHTS": "false", "EVAL_SPLIT": "0.2", "RECOMPUTED_LAYERS": "1"},
        {"PACKING": "true"},
    ],
)
def test_captured_passes_train_what_the_others_train(
    prepared: Prepared, captures: type[Again], more: dict[str, str]
) -> None:
    settings = {**FUSED, **more}
    launched = prepared("launched", **settings, CUDA_GRAPHS="false")
    train(launched)
    assert not captures.launches
    run = prepared("captured", **settings, CUDA_GRAPHS="true")  # variables stay set
    train(run)
    assert captures.launches, "some sizes came at least twice"
    assert_equal(adapter(run), adapter(launched), 1e-4)
    histories = [read_json(one.paths.trainer_state_file)["log_history"] for one in (launched, run)]
    for name in ("loss", "grad_norm", "num_tokens", "entropy", "mean_token_accuracy"):
        wanted, found = ([entry[name] for entry in history if name in entry] for history in histories)
        assert wanted
        assert found == pytest.approx(wanted, rel=1e-4)


def test_a_captured_pass_reads_nothing_from_the_host_that_differs_between_steps(
    prepared: Prepared, captures: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[tuple[int, int, bool]]] = {}
    plain = FusedLayer.forward

    def watched(self: FusedLayer, x: Any, rows: Any, seeds: Any) -> Any:
        if self.moment is not None:  # training, not the proof before it
            seen.setdefault(id(self), set()).add((self.dropout_seed, self.first_token, len(x) == rows.longest))
        return plain(self, x, rows, seeds)

    monkeypatch.setattr(FusedLayer, "forward", watched)
    train(prepared("run", **FUSED, MICRO_BATCH_TOKENS="100"))
    assert captures.launches
    assert [len(found) for found in seen.values()] == [1, 1], "what a graph would have kept from the first step"


def test_a_resumed_run_captures_again_and_ends_with_the_same_bits(
    prepared: Prepared, captures: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.test_resume import train_with_stops

    straight, stopped = (prepared(name, **FUSED) for name in ("straight", "stopped"))
    train(straight)
    train_with_stops(stopped, monkeypatch, 2, 3)
    assert_equal(adapter(stopped), adapter(straight))


def test_a_pass_that_cannot_be_captured_is_launched_kernel_by_kernel_and_said_so(
    prepared: Prepared, captures: type[Again], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched, run = prepared("launched", **FUSED), prepared("run", **FUSED)
    train(launched)

    def refuse(self: Again, compute: Callable[[], Result]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Again, "__call__", refuse)
    capsys.readouterr()
    train(run)
    assert capsys.readouterr().out.count("launched kernel by kernel") == 1
    assert_equal(adapter(run), adapter(launched), 1e-4)


def test_a_full_gpu_gives_captured_passes_up_before_anything_else(
    prepared: Prepared, captures: type[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    executions: list[Execution] = []
    remember, plain = Execution.prepare, FusedLayer.backward_

    def prepare(self: Execution, *arguments: Any) -> None:
        remember(self, *arguments)
        executions.append(self)

    def full_once(self: FusedLayer, *arguments: Any, **named: Any) -> Any:
        if executions and len(captures.launches) == 2 and executions[0].captured.most_tokens:  # type: ignore[union-attr]
            raise torch.OutOfMemoryError("full")
        return plain(self, *arguments, **named)

    whole, run = prepared("whole", **FUSED), prepared("run", **FUSED)
    train(whole)
    captures.launches = []
    monkeypatch.setattr(Execution, "prepare", prepare)
    monkeypatch.setattr(FusedLayer, "backward_", full_once)
    train(run)
    plan = executions[0].plan
    assert plan is not None
    assert (plan.captured_tokens, plan.recomputed) == (0, 0)
    assert_equal(adapter(run), adapter(whole), 1e-4)


def test_sizes_are_filled_up_with_a_row_that_is_not_learned() -> None:
    assert [filled(tokens) for tokens in (1, 128, 129)] == [128, 128, 256]
    found: list[dict[str, Any]] = []

    def compute(inputs: dict[str, Any], learned: torch.Tensor) -> Result:
        found.append(
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        )
        return Result(torch.zeros(()), learned)

    class Space:
        captures, updates = False, 0

    passes = CapturedPasses(256, Space(), torch.device("cpu"), Again(torch.device("cpu")))  # type: ignore[arg-type]
    for tokens, rows in ((5, [0, 2, 5]), (130, [0, 1, 9, 130])):
        part = {
            "input_ids": torch.full((1, tokens), 7), "labels": torch.full((1, tokens), 7), "cu_seq_lens_q": torch.tensor(rows),
            "position_ids": torch.ones(1, tokens, dtype=torch.int64),
        }  # fmt: skip
        passes.run(part, torch.tensor(3), compute)
    assert not passes.serves({"input_ids": torch.zeros(1, 257)})
    for inputs, size, tokens, rows in zip(
        found, (128, 256), (5, 130), ([0, 2, 5, 128], [0, 1, 9, 130, 256, 256]), strict=True
    ):
        assert inputs["cu_seq_lens_q"].tolist() == rows
        assert inputs["labels"].tolist() == [[7] * tokens + [-100] * (size - tokens)]
        assert inputs["input_ids"].tolist() == [[7] * tokens + [0] * (size - tokens)]


def test_flat_gradients_sum_up_over_batches_and_go_back_to_an_earlier_state() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    flat = FlatGradients(parameters)

    def add() -> None:
        flat.begin()
        (2 * sum(leaf.sum() for leaf in flat.leaves.values())).backward()  # type: ignore[union-attr]
        flat.end(processes=1)

    def gradients() -> set[float]:
        return {float(value) for parameter in parameters for value in parameter.grad.flatten()}  # type: ignore[union-attr]

    add()
    assert gradients() == {2.0}
    before = Gradients(parameters, accumulate=True)
    add()
    assert gradients() == {4.0}
    before.restore()
    add()
    assert gradients() == {4.0}
    for parameter in parameters:
        parameter.grad = None
    add()
    assert gradients() == {2.0}
    parameters[0].data.fill_(5.0)
    assert float(flat.leaves[parameters[0]].sum()) == 30.0, "leaves have the parameters' values"
