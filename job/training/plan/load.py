"""What memory and time of a training step depend on: the model's shape with its adapters, and the batches of the data.

This file does not import torch, so planning is immediate and needs no GPU.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.model.architectures import Decoder, NotDescribed
from job.settings import Settings


@dataclass(frozen=True)
class Shape:
    """What memory and time of a model with LoRA depend on: the dimensions of its decoder, and the adapters."""

    decoder: Decoder
    rank: int
    targets: frozenset[str]
    drops: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], settings: Settings) -> Shape:
        """The shape from a model's config.json. Raises NotDescribed if the fused layers do not compute the model."""
        decoder = Decoder.of(config)
        architecture = decoder.architecture
        wanted: tuple[str, ...] = architecture.default_targets
        if settings.lora_target_modules == "all-linear":
            wanted = architecture.linear
        elif settings.lora_target_modules != "auto":
            wanted = tuple(settings.lora_target_modules)
        targets = frozenset(wanted) & frozenset(architecture.linear)
        return cls(decoder, settings.lora_r, targets, settings.lora_dropout > 0)

    @property
    def layers(self) -> int:
        return self.decoder.layers

    @property
    def _parts(self) -> tuple[tuple[tuple[str, ...], int, int], ...]:
        """The layers of each of the four products, with their common inputs and all their outputs."""
        one, architecture = self.decoder, self.decoder.architecture
        return (
            (architecture.inputs, one.hidden, one.packed),
            (("o_proj",), one.query, one.hidden),
            (architecture.gates, one.hidden, 2 * one.intermediate),
            (("down_proj",), one.intermediate, one.hidden),
        )

    @property
    def groups(self) -> tuple[tuple[int, int, int], ...]:
        """Inputs, outputs and the border (total adapter rank, see `fused/frozen.py`) of each of a layer's four products."""
        padded = -(-self.rank // 8) * 8
        return tuple(
            (inputs, outputs, padded * len(self.targets & set(names))) for names, inputs, outputs in self._parts
        )

    @property
    def adapted_inputs(self) -> int:
        """The widths of the inputs of a layer's adapters, added up."""
        return sum(inputs * len(self.targets & set(names)) for names, inputs, _ in self._parts)

    @property
    def layer_weights(self) -> int:
        """The number of frozen weights in a layer's products."""
        return sum(inputs * outputs for inputs, outputs, _ in self.groups)

    @property
    def layer_adapter(self) -> int:
        """The number of trained weights in a layer."""
        one = self.decoder
        shared = one.shared_heads * one.head_dim
        apart = {"q_proj": one.query, "k_proj": shared, "v_proj": shared,
                 "gate_proj": one.intermediate, "up_proj": one.intermediate}  # fmt: skip
        return sum(
            self.rank * (inputs + apart.get(name, outputs))
            for names, inputs, outputs in self._parts
            for name in names
            if name in self.targets
        )


# SFTConfig arguments that change nothing between a batch and its gradients. All others are for plain layers.
_HARMLESS_STARTS = (
    "adam_",
    "dataloader_",
    "ddp_",
    "log_",
    "logging_",
    "lr_scheduler_",
    "warmup_",
    "eval_",
    "optim_",
    "project",
)
_HARMLESS = frozenset({
    "loss_type", "average_tokens_across_devices", "include_num_input_tokens_seen", "torch_empty_cache_steps", "run_name",
    "skip_memory_metrics", "shuffle_dataset", "dataset_num_proc", "truncation_mode", "length_column_name",
    "train_sampling_strategy", "group_by_length", "metric_for_best_model", "greater_is_better", "trackio_space_id",
    "include_tokens_per_second", "use_legacy_prediction_loop", "batch_eval_metrics", "prediction_loss_only",
})  # fmt: skip


def unusual_adapter(settings: Settings) -> str | None:
    """The setting that makes the adapter something that the fused layers do not compute. None if there is none."""
    named = {
        "FT_USE_DORA": settings.use_dora, "FT_LORA_RANK_PATTERN": settings.lora_rank_pattern,
        "FT_MODULES_TO_SAVE": settings.modules_to_save, "FT_NEW_TOKENS": settings.new_tokens,
    }  # fmt: skip
    return next((name for name, value in named.items() if value), None)


def obstacle(settings: Settings, config: Mapping[str, Any], longest_row: int = 0) -> str | None:
    """Why the fused layers cannot compute this run on any card, or None if they can. Only fused layers have plans.

    `longest_row` are the tokens of the data's longest row, if that is known.
    """
    if settings.decoder_layers in ("plain", "compiled"):
        return f"FT_DECODER_LAYERS={settings.decoder_layers}"
    try:
        decoder = Decoder.of(config)
    except NotDescribed as error:
        return str(error)
    if decoder.softcap is not None and settings.device == "cuda":
        return "no attention kernel of theirs limits scores, as this model does (attn_logit_softcapping)"
    if decoder.lengths_matter_from is not None and longest_row >= decoder.lengths_matter_from:
        return f"with rows of {decoder.lengths_matter_from:,} tokens or more, the model's positions depend on what is computed together"
    if settings.padding_free is False and not settings.packing:
        return "they need rows without padding (FT_PADDING_FREE)"
    if settings.sharding != "none":
        return "they do not support shards (FT_SHARDING)"
    if settings.device_map != "auto":
        return "they need the whole model on one GPU (FT_DEVICE_MAP)"
    if (kind := unusual_adapter(settings)) is not None:
        return f"they compute plain LoRA of one rank only ({kind})"
    extra = settings.extra_training_args
    if extra.get("loss_type") not in (None, "nll") or extra.get("label_smoothing_factor"):
        return "they support one loss only (FT_EXTRA_TRAINING_ARGS: loss_type, label_smoothing_factor)"
    others = [
        name
        for name, value in extra.items()
        if value and name not in _HARMLESS and not name.startswith(_HARMLESS_STARTS)
    ]
    if others:
        return f"it is not known whether they would compute the same with {', '.join(others)} (FT_EXTRA_TRAINING_ARGS)"
    if settings.device == "cuda" and settings.bnb_4bit_compute_dtype == "float32":
        return "their attention needs 16 bits (FT_BNB_4BIT_COMPUTE_DTYPE)"
    return None


@dataclass(frozen=True)
class Load:
    """The batches of a run on one GPU.

    `batches` are the tokens of some representative batches. Each has `rows` rows, and attention starts again at each
    row. `largest_batch` is the most tokens that a batch can have, and `longest_row` the tokens of the longest row.
    `mean_context` is the mean length of the row that a token is in.
    """

    rows: int
    batches: tuple[float, ...]
    largest_batch: int
    longest_row: int
    mean_context: float

    @property
    def mean_batch(self) -> float:
        return sum(self.batches) / len(self.batches)

    @classmethod
    def one(cls, tokens: int, mean_context: float) -> Load:
        """A single batch of one row."""
        return cls(1, (tokens,), tokens, tokens, mean_context)

    @classmethod
    def of(
        cls,
        lengths: Mapping[int, int],
        batch_size: int,
        packed_rows: int | None,
        max_length: int,
        *,
        grouped: bool = False,
    ) -> Load:
        """The load of documents, of which `lengths` counts those of each length.

        Packed documents fill `packed_rows` rows of `max_length`. `grouped` documents share batches with others of
        similar length.
        """
        tokens = sum(length * count for length, count in lengths.items())
        context = sum(length * length * count for length, count in lengths.items()) / tokens
        longest = max(lengths)
        if packed_rows is not None:  # packed rows may be cut between documents
            batch, documents = (batch_size * count / packed_rows for count in (tokens, sum(lengths.values())))
            return cls(max(1, round(documents)), (batch,), batch_size * max_length, longest, context)
        largest, missing = 0, batch_size
        for length in sorted(lengths, reverse=True):
            taken = min(missing, lengths[length])
            largest, missing = largest + taken * length, missing - taken
        batches = tuple(min(batch, largest) for batch in _batches(lengths, batch_size, grouped))
        return cls(batch_size, batches, largest, longest, context)


_BATCHES = 32  # batches that represent all


def _batches(lengths: Mapping[int, int], batch_size: int, grouped: bool) -> tuple[float, ...]:
    """Tokens of representative batches: evenly spaced quantiles of the row lengths, scaled to the mean of all rows."""
    ordered = sorted(lengths)
    behind = list(itertools.accumulate(lengths[length] for length in ordered))
    rows = _BATCHES * batch_size
    found = [ordered[bisect.bisect_left(behind, behind[-1] * (row + 0.5) / rows)] for row in range(rows)]
    if not grouped:
        random.Random(0).shuffle(found)
    mean_length = sum(length * count for length, count in lengths.items()) / behind[-1]
    by = mean_length * rows / sum(found)
    return tuple(by * sum(found[begin : begin + batch_size]) for begin in range(0, rows, batch_size))


def load_of(data_report: Mapping[str, Any], settings: Settings) -> Load:
    """The load that the prepared data's report describes."""
    train, longest = data_report["train"], int(data_report["max_length"])
    counted = train.get("lengths") or {longest: train["rows"]}  # earlier versions did not count lengths
    lengths = {int(length): count for length, count in counted.items()}
    batch_size = settings.per_device_train_batch_size
    return Load.of(lengths, batch_size, train.get("packed_rows"), longest, grouped=settings.group_by_length)
