"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), built by peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from job.errors import InputError
from job.settings import Settings


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
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), low_cpu_mem_usage=True)
    return model


def _stay(*_: object, **__: object) -> None:
    pass


def _require_fit(folder: Path, model: PeftModel) -> None:
    # peft only warns about a file that fits no layer, and the base would then pass for the trained model
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        differing = set(stored.keys()) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if differing:
        raise InputError(f"The trained adapter does not fit its model: {min(differing)}, ….", "This is a bug.")
