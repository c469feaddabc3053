"""What the configuration of an earlier adapter says, as settings: training goes on with the adapter as it was made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from job.errors import InputError, SettingsError
from job.settings import Settings, default_value, variable

# a field of adapter_config.json, and the setting that means it
_FIELDS = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora",
    "rank_pattern": "lora_rank_pattern", "alpha_pattern": "lora_alpha_pattern", "modules_to_save": "modules_to_save",
    "target_modules": "lora_target_modules",
}  # fmt: skip
# what else may be in one, with the values that change nothing
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "fan_in_fan_out": (False, None), "layers_to_transform": (None, []),
    "layer_replication": (None, []), "megatron_config": (None,), "target_parameters": (None, []),
    "use_qalora": (False, None), "use_bdlora": (None, False), "lora_bias": (False, None), "alora_invocation_tokens": (None,), "exclude_modules": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base, too
    "arrow_config": (None,), "corda_config": (None,), "eva_config": (None,),
}  # fmt: skip


def with_adapters_own(settings: Settings, config: Mapping[str, Any]) -> Settings:
    """The settings with those of the adapter that FT_ADAPTER_NAME names, from its adapter_config.json.

    Raises InputError for an adapter of a kind that the job does not train, and SettingsError for a setting that was set to
    something else.
    """
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise InputError(
                f"FT_ADAPTER_NAME={settings.adapter_name}: its {name} is {str(config[name])[:60]!r}, which this job does not train.",
                "Convert it with peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)."
                if name == "init_lora_weights"
                else "It must be a LoRA adapter of linear layers, named one by one.",
            )
    if not isinstance(config.get("target_modules"), list):
        raise InputError(
            f"FT_ADAPTER_NAME={settings.adapter_name}: its target_modules are not a list of names.",
            "Name them in its adapter_config.json.",
        )
    if outer := [
        name for name in config["target_modules"] if re.search(r"(^|\.)(lm_head|embed_tokens|wte)$", str(name))
    ]:
        raise InputError(
            f"FT_ADAPTER_NAME={settings.adapter_name}: it adapts {outer[0]}, which is no inner layer and which this job does not merge.",
            "Choose an adapter of the decoder's linear layers.",
        )
    if config.get("trainable_token_indices") and not settings.new_tokens:
        raise InputError(
            f"FT_ADAPTER_NAME={settings.adapter_name} was trained with new tokens.",
            "Set FT_NEW_TOKENS to the same ones, in their order.",
        )
    own: dict[str, Any] = {}
    for name, setting in _FIELDS.items():
        found = config.get(name)
        value = default_value(setting) if found is None else found
        own[setting] = tuple(sorted(value)) if isinstance(value, list) else value
    try:
        checked = Settings.model_validate({**settings.model_dump(), **own})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(
            f"FT_ADAPTER_NAME={settings.adapter_name}: its adapter_config.json asks for {wrong['loc'][0]} = {str(wrong['input'])[:60]}: {wrong['msg']}.",
            "Choose another adapter.",
        ) from error
    _refuse_other(settings, own)
    return settings.model_copy(update={name: getattr(checked, name) for name in own})


def _refuse_other(settings: Settings, own: Mapping[str, Any]) -> None:
    for setting, value in own.items():
        asked = settings.model_dump(mode="json")[setting]
        if asked == default_value(setting):
            continue
        same = (
            sorted(asked) == sorted(value) if isinstance(asked, list) and not isinstance(value, str) else asked == value
        )
        if not same:
            raise SettingsError(
                f"{variable(setting)} is set to {asked!r}, and the adapter of FT_ADAPTER_NAME has {value!r}.",
                "Unset it: training goes on with the adapter as it was made.",
            )
