"""How answers are generated: made by the job, with only the plain ones of those that came with the model.

A model's own generation_config may ask for a hundred thousand beams, or for a search without an end.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a served model may keep, and between which bounds it is believed.
_SAMPLING = {"temperature": (0.0, 10.0), "top_p": (0.0, 1.0), "top_k": (0, 1000), "repetition_penalty": (0.1, 10.0)}


def greedy(model: PreTrainedModel) -> GenerationConfig:
    """Always the likeliest token, ending where the model's own configuration says that an answer ends."""
    return GenerationConfig(do_sample=False, **_token_ids(model))


def published(model: PreTrainedModel) -> GenerationConfig:
    """What is published with the model: where answers begin and end, and plain settings for sampling."""
    own = model.generation_config
    kept: dict[str, Any] = {}
    for name, (least, most) in _SAMPLING.items():
        value = getattr(own, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            kept[name] = value
    if getattr(own, "do_sample", None) is True:
        kept["do_sample"] = True
    elif kept:  # sampling settings without sampling are only warned about
        kept = {}
    return GenerationConfig(**kept, **_token_ids(model))


def _token_ids(model: PreTrainedModel) -> dict[str, Any]:
    """Token ids that are in the vocabulary."""
    size = int(model.config.get_text_config().vocab_size)
    found: dict[str, Any] = {}
    for name in _TOKENS:
        value = getattr(model.generation_config, name, None)
        ids = value if isinstance(value, list) else [value]
        known = [one for one in ids if type(one) is int and 0 <= one < size]
        if known:
            found[name] = known if isinstance(value, list) else known[0]
    return found
