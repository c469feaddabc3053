"""CUDA graphs of whole passes, forward and backward, for batches that the GPU computes faster than the host launches them.

A pass of a 7B is some thousand kernels, and Python needs 60 to 120 ms to launch them, however few tokens there are. A
captured pass is launched at once (CUDA C++ Programming Guide, CUDA Graphs). It always computes the same kernels on the
same addresses. So tokens are filled up to a multiple of `STEP` with a row without labels, and everything that differs
between batches is copied to fixed places, or read from them: where rows end, the number of labels, dropout's moment.

The first pass of a size is computed as usual, which compiles and loads its kernels. The second one is captured. All give
the same bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from job.errors import in_a_line
from job.model.fused.workspace import Workspace
from job.report.events import message

STEP = 128  # captured sizes are multiples of that: a smaller one means more graphs, a larger one more padding
_IGNORED = -100
_MOST = 64  # graphs: each takes some megabytes of the GPU's memory


class Result(NamedTuple):
    """The loss of a pass, and its figures (see `PlannedTrainer.compute_loss`)."""

    loss: torch.Tensor
    figures: torch.Tensor


Compute = Callable[[dict[str, Any], torch.Tensor], Result]


class Recorder(Protocol):
    """Records what `compute` does, without doing it. Returns what repeats it, and the results that are then overwritten."""

    def __call__(self, compute: Callable[[], Result]) -> tuple[Callable[[], None], Result]: ...


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def filled(tokens: int) -> int:
    """The size to which a pass of so many tokens is filled up."""
    return -(-tokens // STEP) * STEP


def filled_rows(rows: int) -> int:
    """The number of rows to which a pass is filled up with empty ones: packed batches have other numbers every time."""
    return 1 << (rows - 1).bit_length()


@dataclass(frozen=True)
class _Places:
    """The fixed places of a pass's inputs, for one number of rows. They have room for the largest size."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    learned: torch.Tensor

    @classmethod
    def of(cls, rows: int, most_tokens: int, learned: torch.Tensor, device: torch.device) -> _Places:
        ids, labels, positions = (torch.zeros(1, most_tokens, dtype=torch.int64, device=device) for _ in range(3))
        boundaries = torch.zeros(rows + 2, dtype=torch.int32, device=device)
        return cls(ids, labels, positions, boundaries, torch.zeros_like(learned, device=device))

    def fill(self, part: Mapping[str, Any], size: int, learned: torch.Tensor) -> None:
        tokens = part["input_ids"].shape[1]
        for place, name, more in (
            (self.ids, "input_ids", 0), (self.labels, "labels", _IGNORED), (self.positions, "position_ids", 0),
        ):  # fmt: skip
            place[:, :tokens].copy_(part[name])
            place[:, tokens:size].fill_(more)
        boundaries = part["cu_seq_lens_q"]
        self.boundaries[: len(boundaries)].copy_(boundaries)
        self.boundaries[len(boundaries) :].fill_(size)
        self.learned.copy_(learned)

    def inputs(self, size: int) -> dict[str, Any]:
        """What the model is called with. Every call returns new views, since what is derived from them is cached."""
        boundaries = self.boundaries[:]
        return {
            "input_ids": self.ids[:, :size], "labels": self.labels[:, :size], "position_ids": self.positions[:, :size],
            "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": size, "max_length_k": size,
            "every_token": True,
        }  # fmt: skip


class CapturedPasses:
    """Passes of at most `most_tokens`, captured and launched again. Their gradients must be added to fixed places."""

    def __init__(
        self, most_tokens: int, workspace: Workspace, device: torch.device, record: Recorder | None = None
    ) -> None:
        self.most_tokens = most_tokens
        self._workspace, self._device, self._record = workspace, device, record or OnGpu(device)
        self._places: dict[int, _Places] = {}
        self._passes: dict[tuple[int, int], tuple[Callable[[], None], Result] | None] = {}

    def serves(self, part: Mapping[str, Any]) -> bool:
        return filled(part["input_ids"].shape[1]) <= self.most_tokens

    def run(self, part: Mapping[str, Any], learned: torch.Tensor, compute: Compute) -> Result:
        """`compute(part, learned)`, filled up. The result is overwritten by the next pass of the same size.

        `learned` is the number of labels of the whole step, on the device.
        """
        size, rows = filled(part["input_ids"].shape[1]), filled_rows(len(part["cu_seq_lens_q"]) - 1)
        if rows not in self._places:
            self._places[rows] = _Places.of(rows, self.most_tokens, learned, self._device)
        places = self._places[rows]
        places.fill(part, size, learned)
        found = self._passes.get((size, rows))
        if (size, rows) not in self._passes:
            self._passes[size, rows] = None
        elif found is None and len(self._passes) <= _MOST:
            found = self._passes[size, rows] = self._captured(lambda: compute(places.inputs(size), places.learned))
        if found is None:
            return compute(places.inputs(size), places.learned)
        launch, result = found
        launch()
        return result

    def _captured(self, compute: Callable[[], Result]) -> tuple[Callable[[], None], Result] | None:
        """None if it cannot be captured. Then no further passes are either."""
        self._workspace.captures = True
        try:
            return self._record(compute)
        except Exception as error:  # CUDA, its libraries and Triton may raise anything
            self.forget()
            message(f"Short batches are launched kernel by kernel, which is slower: {in_a_line(error)}.", "warning")
            return None
        finally:
            self._workspace.captures = False
            self._workspace.updates += 1  # a capture has copied no adapters

    def forget(self) -> None:
        """Free all captured passes, and capture no more."""
        self.most_tokens = 0
        self._passes.clear()
        self._places.clear()


class OnGpu:
    """Records CUDA graphs, which share one pool of memory: they are launched one after another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, compute: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # a capture cannot take back what the allocator holds for other streams
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        collects = gc.isenabled()
        gc.disable()  # it might free what CUDA does not let go of meanwhile
        try:
            with torch.cuda.stream(self._stream):
                # other threads go on: those that copy batches, or upload checkpoints
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = compute()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        before.wait_stream(self._stream)
        return graph.replay, result
