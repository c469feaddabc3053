"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), built by peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from job.errors import InputError, in_a_line
from job.settings import Settings

ADAPTERS_HINT = (
    "An adapter must have been made for FT_MODEL_NAME, and hold every tensor that its adapter_config.json names."
)


def lora_config(
    settings: Settings, tokens: dict[str, list[int]] | list[int] | None = None, auto: Sequence[str] | None = None
) -> LoraConfig:
    """The FT_LORA_* settings as peft's LoraConfig, with the rows of `tokens` to train beside.

    `auto` are the layers that FT_LORA_TARGET_MODULES=auto stands for. None leaves that to peft.
    """
    targets: str | list[str] | None
    if settings.lora_target_modules == "auto":
        targets = None if auto is None else list(auto)
    elif settings.lora_target_modules == "all-linear":
        targets = "all-linear"
    else:
        targets = list(settings.lora_target_modules)
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=dict(settings.lora_rank_pattern),
        alpha_pattern=dict(settings.lora_alpha_pattern),
        modules_to_save=list(settings.modules_to_save) or None,
        ensure_weight_tying=bool(settings.modules_to_save),  # else head and embedding of a tied model part ways
        trainable_token_indices=tokens,
        bias="none",
        task_type="CAUSAL_LM",
    )


def hold_adapter_in_float32(model: PeftModel) -> None:
    """Cast the trained parameters to float32, and with them their gradients.

    trl casts those of a 4-bit model to bfloat16, in which most updates of a usual learning rate round to nothing: they are
    smaller than half of the last of its 8 bits.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def with_adapter(folder: Path, base: PreTrainedModel) -> PeftModel:
    """`base` with the adapter in `folder`, in evaluation mode. `disable_adapter()` gives the base's own answers.

    Raises InputError if the adapter does not fit the model.
    """
    with _fitting(folder):
        model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    _require_fit(folder, model)
    model.eval()
    return model


def with_adapter_alone(folder: Path, skeleton: PreTrainedModel) -> PeftModel:
    """The adapter in `folder` on a model on the meta device: only the adapter has values, on the CPU.

    Raises InputError if the adapter does not fit the model.
    """
    model = get_peft_model(skeleton, LoraConfig.from_pretrained(folder), low_cpu_mem_usage=True)
    for module in model.modules():
        if hasattr(module, "_move_adapter_to_device_of_base_layer"):  # which would empty it
            module._move_adapter_to_device_of_base_layer = _stay
    _require_fit(folder, model)
    with _fitting(folder):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), low_cpu_mem_usage=True)
    return model


def _stay(*_: object, **__: object) -> None:
    pass


def _require_fit(folder: Path, model: PeftModel) -> None:
    # peft only warns about a file that fits no layer, and the base would then pass for the trained model
    with _fitting(folder), safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        differing = set(stored.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if differing:
        raise InputError(f"The adapter in {folder} does not fit its model: {min(differing)}, ….", ADAPTERS_HINT)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Raise InputError for a file that cannot be read, or whose tensors have other shapes than the model's."""
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        raise InputError(
            f"The adapter in {folder} does not fit its model: {in_a_line(error)}", ADAPTERS_HINT
        ) from error
