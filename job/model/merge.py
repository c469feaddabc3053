"""Merging an adapter into the weights that it was trained on, tensor by tensor, without a model in memory.

A QLoRA adapter has learned to correct the *4-bit* base. Merging it into the original 16-bit weights, as is common,
gives a model that nobody trained. Here W' = dequantized(W) + scale · B·A, computed in float32 and rounded once.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from job.errors import InputError
from job.model import generation
from job.model.adapters import with_adapter_alone
from job.model.changes import Change, base_weights, changes_of
from job.model.compute import Compute
from job.model.quantization import FourBit, four_bit_config, full_weight
from job.model.safetensors_files import Tensor, Weights, write_shards
from job.model.vocabulary import grow
from job.settings import Settings

_CODE_FIELDS = ("auto_map", "custom_pipelines", "custom_generate")  # name code that a loader may run
_VALUES_AT_ONCE = 1 << 18  # 1 MiB in float32, which stays in a core's cache
_PACKED = ".quant_state.bitsandbytes__"  # beside a weight that is stored in 4 bits


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights become those of the merged model.

    `held_in` is the type in which training held weights that are not in 4 bits, or None to take the base's own values.
    `dtype` is the type that is written, and `shard_bytes` the size of a file.
    """

    device: torch.device
    held_in: torch.dtype | None
    four_bit: FourBit | None
    dtype: torch.dtype
    shard_bytes: int = 4_000_000_000

    @classmethod
    def of(cls, settings: Settings, compute: Compute, stored: torch.dtype) -> Recipe:
        """FT_MERGE_BASE, FT_MERGE_DTYPE and FT_MAX_SHARD_GB for a base whose weights are `stored` in that type."""
        as_trained = settings.merge_base == "quantized"
        return cls(
            device=compute.device,
            held_in=compute.dtype if as_trained else None,
            four_bit=FourBit.of(settings) if as_trained and settings.use_4bit else None,
            dtype=stored if settings.merge_dtype == "auto" else getattr(torch, settings.merge_dtype),
            shard_bytes=int(settings.max_shard_gb * 1e9),
        )


class UnknownLayout(Exception):
    """The base's files name its weights otherwise than transformers does, so that they cannot be merged one by one."""


def write_merged(
    base: Path,
    adapter: Path,
    folder: Path,
    settings: Settings,
    recipe: Recipe,
    compute: Compute,
    go_on: Callable[[], None] = lambda: None,
    tokens: int = 0,
) -> dict[str, str]:
    """Write base and adapter as one plain model: safetensors that transformers loads without peft.

    Files, names and order are the base's own. Embedding and head get rows for `tokens` tokens. Returns the SHA-256 of each file with weights. `go_on` is called between
    tensors, and raises to end the merge. Raises InputError if a value does not fit the type that is written, and
    UnknownLayout before anything is written.
    """
    model = with_adapter_alone(adapter, skeleton(base, tokens))
    changes = changes_of(model)
    stored = Weights(base)
    packed = {name.partition(_PACKED)[0] for name in stored if _PACKED in name}
    quantized = set() if recipe.four_bit is None or packed else _in_four_bits(base, settings, compute.dtype)
    shapes = {name: tuple(parameter.shape) for name, _, parameter in base_weights(model)}
    if missing := (quantized | packed | set(changes) | set(shapes)) - set(stored) - set(_tied(model.get_base_model())):
        raise UnknownLayout(min(missing))
    buffers = {name for name, _ in model.get_base_model().named_buffers()}
    # a file may hold what no model reads, such as the scales of another program
    wanted = [name for name in stored if name in {*shapes, *buffers} and name not in _tied(model.get_base_model())]
    tensors = {}
    for name in wanted:
        shape = shapes.get(name, stored.shape(name)) if name in changes or name in packed else stored.shape(name)
        floating = name in packed or stored[name].is_floating_point()
        tensors[name] = Tensor(
            shape,
            recipe.dtype if floating else stored[name].dtype,
            functools.partial(
                _merged,
                stored,
                name,
                shape,
                recipe,
                changes.get(name),
                quantize=name in quantized,
                packed=name in packed,
            ),
        )
    hashes = write_shards(folder, tensors, recipe.shard_bytes, go_on)
    write_config(base, folder, recipe.dtype, model.get_base_model())
    return hashes


@torch.no_grad()
def _merged(
    stored: Weights,
    name: str,
    shape: tuple[int, ...],
    recipe: Recipe,
    change: Change | None,
    *,
    quantize: bool,
    packed: bool,
) -> torch.Tensor:
    """One weight of the merged model."""
    values = _unpacked(stored, name, recipe.device) if packed else stored[name]
    if not packed and not values.is_floating_point():
        return values
    if (
        change is None
        and not quantize
        and not packed
        and recipe.held_in in (None, values.dtype)
        and values.dtype == recipe.dtype
    ):
        return values
    values = values.to(recipe.device)
    result = torch.empty(shape, dtype=recipe.dtype)
    rows_of = _rows_of(values, recipe, quantize=quantize, held=not packed)

    def write(first: int, last: int) -> None:
        rows = rows_of(first, last).float()
        changed = rows if change is None else change.rows(rows, first)
        if recipe.dtype == torch.float16 and not bool(changed.abs().amax() <= torch.finfo(recipe.dtype).max):
            raise InputError(
                f"{name} of the merged model has values that do not fit float16, which ends at {torch.finfo(recipe.dtype).max:,.0f}.",
                "Set FT_MERGE_DTYPE=bfloat16. The adapter is intact.",
            )
        result[first:last] = changed

    pieces = _pieces(shape)
    if recipe.device.type == "cpu" and len(pieces) > 1:
        with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(write, *zip(*pieces, strict=True)))
    else:
        for first, last in pieces:
            write(first, last)
    return result


def _rows_of(values: torch.Tensor, recipe: Recipe, *, quantize: bool, held: bool) -> Callable[[int, int], torch.Tensor]:
    """A function that gives the base's rows `first` to `last`, as training held them. Rows that it lacks are zeros."""
    as_held = recipe.held_in if held and recipe.held_in is not None else values.dtype
    if quantize:
        assert recipe.four_bit is not None
        if values.device.type == "cpu" and (in_parts := recipe.four_bit.in_parts(values, as_held)) is not None:
            return in_parts
        values = recipe.four_bit.values(values.to(as_held))

    def rows(first: int, last: int) -> torch.Tensor:
        part = values[first:last].to(as_held)
        lacking = last - first - len(part)
        return torch.cat([part, part.new_zeros((lacking, *values.shape[1:]))]) if lacking else part

    return rows


def _pieces(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of rows that do not take much memory in float32."""
    rows = shape[0]
    step = max(1, _VALUES_AT_ONCE // max(1, math.prod(shape[1:])))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _unpacked(stored: Weights, name: str, device: torch.device) -> torch.Tensor:
    """A weight that the base's files hold in 4 bits."""
    statistics = {key: stored[key] for key in stored if key.startswith(f"{name}.")}
    parameter = bnb.nn.Params4bit.from_prequantized(stored[name], statistics, device=device)
    values: torch.Tensor = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return values


def skeleton(base: Path, tokens: int = 0) -> PreTrainedModel:
    """The plain model of a folder, with names and shapes but without values, and with rows for at least `tokens` tokens."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        grow(model, tokens)
    return model.eval()


def _in_four_bits(base: Path, settings: Settings, dtype: torch.dtype) -> set[str]:
    """The weights that transformers holds in 4 bits when it loads the model so. It leaves out the head, for one."""
    model = skeleton(base)
    quantizer = AutoHfQuantizer.from_config(four_bit_config(settings, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def _tied(model: PreTrainedModel) -> set[str]:
    """The weights that are another one's: a file may hold them, but nobody reads them."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def write_config(base: Path, folder: Path, dtype: torch.dtype, model: PreTrainedModel) -> None:
    """The base's own config.json, whose words every version of transformers knows, without what names code or 4 bits."""
    config = _without(
        json.loads((base / "config.json").read_text(encoding="utf-8")), (*_CODE_FIELDS, "quantization_config")
    )
    text = model.config.get_text_config()
    for part in (config, *(config[name] for name in ("text_config",) if isinstance(config.get(name), dict))):
        for name in ("dtype", "torch_dtype"):
            if name in part or name == "torch_dtype":  # the name that older versions know
                part[name] = str(dtype).removeprefix("torch.")
        _say_rotation_as_before(part)
        if "vocab_size" in part:
            part["vocab_size"] = text.vocab_size
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if (base / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base)
    generation.published(model).save_pretrained(folder)


def _say_rotation_as_before(config: dict[str, Any]) -> None:
    """Versions of transformers before 5, vLLM's and llama.cpp's converter know `rope_theta`, and not `rope_parameters`."""
    turning = config.get("rope_parameters")
    if isinstance(turning, dict) and isinstance(turning.get("rope_theta"), int | float):
        config.setdefault("rope_theta", turning["rope_theta"])
        if turning.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", {name: value for name, value in turning.items() if name != "rope_theta"})


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def write_merged_whole(model: PeftModel, base: Path, folder: Path, recipe: Recipe, tokens: int = 0) -> None:
    """The same from a model in memory, with transformers' names: for bases whose files name weights in their own way."""
    plain = skeleton(base, tokens)
    state = {name: value.to(recipe.dtype).cpu() for name, value in merged_state(model)}
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    left_out = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if left_out:
        raise RuntimeError(f"the trained model has no {', '.join(left_out)}")
    plain.save_pretrained(folder, max_shard_size=recipe.shard_bytes)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only the owner can read
    write_config(base, folder, recipe.dtype, plain)


@torch.no_grad()
def merged_state(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the plain model under its plain name, in float32 where the adapter changes it."""
    changes = changes_of(model)
    for name, module, parameter in base_weights(model):
        values = full_weight(module) if name.endswith(".weight") else parameter.data
        yield name, changes[name].rows(values.float(), 0) if name in changes else values
