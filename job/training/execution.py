"""Executes the plan: sets up the layers, cuts batches into micro-batches, and switches plans when memory runs out."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments

from job.errors import InputError, KernelsFault, MemoryFull, NodeError, in_a_line
from job.model.architectures import Decoder
from job.model.compilation import compile_layers
from job.model.device import is_alive
from job.model.fused import MANY_TOKENS
from job.model.fused.head import can_fuse_head, fuse_head
from job.model.fused.layer import LINEAR_LAYERS, FusedLayer, can_fuse, fuse_layer
from job.model.fused.proof import Proof
from job.model.fused.workspace import Workspace
from job.model.patches import Patches
from job.model.quantization import make_resident
from job.report.events import message
from job.settings import Settings
from job.training.captured import CapturedPasses
from job.training.choice import SLOWER, Choice, free_bytes, is_asked_for
from job.training.gradients import FlatGradients
from job.training.plan.candidates import Plan
from job.training.plan.choose import smaller_plan
from job.training.ranks import is_so_everywhere

_PLAIN = "Set FT_DECODER_LAYERS=plain."


class Execution:
    """Computes the steps of this process as chosen. `patches` holds its changes to the model.

    `plan` is None if transformers and peft compute the layers. Then only FT_GRADIENT_CHECKPOINTING decides what is
    recomputed. `rank` is this process's rank, and `evaluated_tokens` the most tokens that an evaluation computes at
    once.
    """

    def __init__(self, settings: Settings, choice: Choice, *, rank: int = 0, evaluated_tokens: int = 0) -> None:
        self._settings, self._rank, self._evaluated_tokens = settings, rank, evaluated_tokens
        self.compute, self.shape, self.plan, self._card = choice.compute, choice.shape, choice.plan, choice.card
        self.patches = Patches()
        self._layers: list[FusedLayer] = []
        self.gradients: FlatGradients | None = None
        self.captured: CapturedPasses | None = None
        self._workspace: Workspace | None = None
        self._moment: torch.Tensor | None = None

    @property
    def recomputes_by_library(self) -> bool:
        """Whether to use transformers' gradient checkpointing: without a plan, on a GPU, unless it is switched off."""
        wanted = self._settings.gradient_checkpointing
        return self.plan is None and (self.compute.on_gpu if wanted == "auto" else bool(wanted))

    def described(self) -> dict[str, Any] | None:
        """The current plan for `metrics.json`, or None without a plan."""
        return asdict(self.plan) if self.plan is not None else None

    def prepare(self, model: PeftModel, arguments: TrainingArguments) -> None:
        """Set the model's layers up as planned. Call this once in every process, when the adapter has its final type.

        If the fused layers fail on this machine, the plain ones are used, and `arguments` are changed accordingly.
        Raises NodeError instead if the settings ask for the fused layers, and KernelsFault if a kernel crashed the GPU.
        """
        self._set_up(model, arguments)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        captures = self.plan is not None and self.plan.captured_tokens > 0
        captures = captures and can_fuse_head(model)  # any other asks the GPU which tokens have a label
        captures = captures and sum(len(layer.trained) for layer in self._layers) == len(trained)
        if is_so_everywhere(captures, self.compute.device):  # since all must average their gradients alike
            self._capture(trained)

    def _capture(self, trained: list[torch.nn.Parameter]) -> None:
        """Prepare the layers for captured passes, whose gradients and dropout's moment have fixed places."""
        assert self.plan is not None and self._workspace is not None
        device = self.compute.device
        self.gradients = FlatGradients(trained)
        self._moment = torch.zeros(2, dtype=torch.int64, device=device)
        for layer in self._layers:
            layer.train_through(self.gradients.leaves)
        self.captured = CapturedPasses(self.plan.captured_tokens, self._workspace, device)

    def _set_up(self, model: PeftModel, arguments: TrainingArguments) -> None:
        settings = self._settings
        if self.plan is None:
            if settings.use_4bit and settings.resident_weights is True:
                make_resident(model, self.patches)
                self.patches.settle_weights()
            if settings.decoder_layers == "compiled":
                compile_layers(model)
            return
        assert self.shape is not None
        decoder = self.shape.decoder
        failure: str | None
        if not can_fuse(
            model, decoder, self.plan.weights
        ):  # such as a checkpoint with some layers in 4 bits, others not
            if is_asked_for(settings):
                raise InputError("The model's layers are not those that its config.json describes.", _PLAIN)
            failure = "the model's layers are not those that its config.json describes"
        else:
            failure = self._fuse(model, self.plan, decoder)
        if failure is None:
            if can_fuse_head(model):
                fuse_head(model, decoder, self.patches)
            self._apply(self.plan)
            return
        if is_asked_for(settings):
            raise NodeError(
                f"The fused layers do not give what the model's own layers give on this machine: {failure}.",
                "Try another card or driver, or unset FT_DECODER_LAYERS and FT_FROZEN_PRECISION.",
            )
        message(f"{SLOWER}: {failure}.", "warning")
        self.patches.undo()
        self._layers, self.plan, self._workspace = [], None, None
        arguments.gradient_checkpointing = self.recomputes_by_library
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()

    def _fuse(self, model: PeftModel, plan: Plan, decoder: Decoder) -> str | None:
        """Fuse a layer of each kind, and the others if these pass the proof. Returns what went wrong, or None."""
        many = max(plan.micro_batch_tokens, plan.longest_row, self._evaluated_tokens) >= MANY_TOKENS
        before, free = self.patches.mark(), self._free_bytes()
        try:
            try:
                return self._proved(model, plan, decoder, many, free)
            except torch.OutOfMemoryError:  # training itself may need less
                self.patches.undo(before)
            torch.cuda.empty_cache()
            return self._proved(model, plan, decoder, many, 0.0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers, drivers and kernels may raise anything
            reason = in_a_line(error)
            if not is_alive(self.compute.device) and not is_asked_for(self._settings):
                raise KernelsFault(
                    f"A kernel of the fused layers crashed the GPU: {reason}.", f"{_PLAIN} Another card may work."
                ) from error
            return reason

    def _proved(self, model: PeftModel, plan: Plan, decoder: Decoder, many: bool, free: float) -> str | None:
        """`_fuse`, with a proof that may use `free` bytes of the GPU."""
        self._workspace = workspace = Workspace(self.patches)

        def fuse(index: int) -> FusedLayer:
            return fuse_layer(model, index, decoder, plan.weights, workspace, self.patches)

        proof, fused = Proof(model, decoder, many=many, free_bytes=free), {}
        for index in proof.kinds():
            proof.prepare(index)
            if (
                plan.weights == "fp8"
                and (failure := self._failure_in_16_bits(model, proof, index, decoder)) is not None
            ):
                return failure
            fused[index] = fuse(index)
            if (failure := proof.failure(index, fused[index], eight_bit=plan.weights == "fp8")) is not None:
                return failure
        proof.forget()
        if can_fuse_head(model) and (failure := proof.head_failure()) is not None:
            return failure
        self.patches.settle_weights()
        self._layers = [fused[index] if index in fused else fuse(index) for index in range(decoder.layers)]
        return None

    def _failure_in_16_bits(self, model: PeftModel, proof: Proof, index: int, decoder: Decoder) -> str | None:
        """What is wrong with a fused layer in 16 bits. The roundings of 8-bit products would hide most mistakes."""
        trial = Patches()
        try:
            fused = fuse_layer(model, index, decoder, "resident", Workspace(trial), trial)
            return proof.failure(index, fused)
        finally:
            trial.undo()

    def _free_bytes(self) -> float:
        """What the proof may use of the GPU beside the model."""
        device = self.compute.device
        if device.type != "cuda":
            return math.inf
        return free_bytes(self._settings, device) - torch.cuda.memory_allocated(device)

    def batches(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Cut the batch into micro-batches of at most the planned tokens. Rows are never cut, even longer ones."""
        if self.plan is None or inputs["input_ids"].shape[1] <= self.plan.micro_batch_tokens:
            yield dict(inputs)
            return
        boundaries: list[int] = inputs["cu_seq_lens_q"].tolist()
        for begin, end in _parts(boundaries, self.plan.micro_batch_tokens):
            columns = slice(boundaries[begin], boundaries[end])
            part = {name: inputs[name][:, columns] for name in ("input_ids", "labels", "position_ids")}
            part["cu_seq_lens_q"] = part["cu_seq_lens_k"] = inputs["cu_seq_lens_q"][begin : end + 1] - boundaries[begin]
            longest = max(b - a for a, b in itertools.pairwise(boundaries[begin : end + 1]))
            part["max_length_q"] = part["max_length_k"] = longest
            yield part

    def seed_dropout(self, *moment: int, first_token: int) -> None:
        """Give every linear layer its own seed for the next micro-batch, which starts at `first_token` of the batch.

        What is dropped depends only on `moment`, FT_SEED, the rank and a token's place in the batch. So a resumed step
        drops what the lost one dropped, whatever the micro-batches, and no generator that others depend on is used.
        """
        named = repr((self._settings.seed, self._rank, *moment)).encode()
        first = int.from_bytes(hashlib.blake2b(named, digest_size=4).digest()) >> 2
        if self._moment is not None:  # where captured passes read it
            self._moment[:1].fill_(first)
            self._moment[1:].fill_(first_token)
            first = first_token = 0
        for index, layer in enumerate(self._layers):
            layer.dropout_seed, layer.first_token = first + index * LINEAR_LAYERS, first_token
            layer.moment = self._moment

    def step_down(self) -> bool:
        """Switch to the next plan that needs less memory. Returns False if there is none."""
        smaller = self._smaller()
        if smaller is None:
            return False
        if self.captured is not None and not smaller.captured_tokens:
            self.captured.forget()
        self._apply(smaller)
        message(f"The GPU ran out of memory. Continuing with {smaller.described(len(self._layers))}.", "warning")
        return True

    def full(self, error: torch.OutOfMemoryError) -> Exception:
        """The error to raise when a process that trains with others runs out of memory."""
        if self._smaller() is None:
            return error
        return MemoryFull(
            f"The GPU ran out of memory: {str(error).splitlines()[0]}",
            "Lower FT_GPU_MEMORY_GIB so that a smaller plan is chosen, or rent a larger card.",
        )

    def _smaller(self) -> Plan | None:
        if self.plan is None or self.shape is None:
            return None
        return smaller_plan(self.plan, self.shape, self._settings, self._card)

    def _apply(self, plan: Plan) -> None:
        self.plan = plan
        for index, layer in enumerate(self._layers):
            layer.kept = index >= plan.recomputed  # the last layers are the first to be freed


def _parts(boundaries: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (first, after the last) with at most `most` tokens, or of a single row."""
    begin = 0
    for end in range(1, len(boundaries)):
        if end + 1 == len(boundaries) or boundaries[end + 1] - boundaries[begin] > most:
            yield begin, end
            begin = end


def switch_mode_only_if_another(model: torch.nn.Module, patches: Patches) -> None:
    """Make `model.train()` return immediately if the model is already in that mode.

    transformers calls it in each pass, and it would visit thousands of modules.
    """
    model.train(model.training)  # from now on all modules agree
    switch = model.train

    def train(mode: bool = True) -> torch.nn.Module:
        return model if model.training == mode else switch(mode)

    patches.replace(model, "train", train)


def with_less_memory(
    compute: Callable[[], torch.Tensor], execution: Execution, undo: Callable[[], None]
) -> torch.Tensor:
    """Return `compute()`. While memory runs out, call `undo` and try again with a smaller plan."""
    while True:
        try:
            return compute()
        except torch.OutOfMemoryError as error:
            undo()
            trace = error.__traceback__
            if not execution.step_down():
                raise
            del trace, error
        torch.cuda.empty_cache()
