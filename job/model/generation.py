"""How answers are generated: made by the job, with only the plain ones of those that came with the model.

A model's own generation_config may ask for a hundred thousand beams, or for a search without an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a served model may keep, and between which bounds it is believed.
_SAMPLING = {"temperature": (0.0, 10.0), "top_p": (0.0, 1.0), "top_k": (0, 1000), "repetition_penalty": (0.1, 10.0)}


def greedy(model: PreTrainedModel, ends: Sequence[int] = ()) -> GenerationConfig:
    """Always the likeliest token, ending where the model's own configuration says that an answer ends.

    It also ends with the tokens `ends`, by which the answers of the training ended.
    """
    return GenerationConfig(do_sample=False, **_with_ends(_token_ids(model), ends))


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


def add_ends(folder: Path, ends: Sequence[int]) -> None:
    """Let a published model's answers end by the tokens `ends`, too: to its base they may have meant nothing."""
    config = GenerationConfig.from_pretrained(folder)
    found = _with_ends({"eos_token_id": config.eos_token_id}, ends)["eos_token_id"]
    if found != config.eos_token_id:
        config.eos_token_id = found
        config.save_pretrained(folder)


def _with_ends(token_ids: dict[str, Any], ends: Sequence[int]) -> dict[str, Any]:
    own = token_ids.get("eos_token_id")
    known = own if isinstance(own, list) else [own] if own is not None else []
    more = [token for token in ends if token not in known]
    return {**token_ids, "eos_token_id": [*known, *more]} if more else token_ids


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


def answer(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> str:
    """The greedy continuation of `prompt_ids`, without special tokens."""
    generated = _generate(model, tokenizer, prompt_ids, max_new_tokens)
    text: str = tokenizer.decode(generated[0, len(prompt_ids) :], skip_special_tokens=True)
    return text.strip()


def stream(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int) -> Iterator[str]:
    """The pieces of an answer, each as soon as it is there. Closing the iterator ends the generation."""
    pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
    ended = False

    class Queued(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.put(text)

    def generate() -> None:
        try:
            _generate(
                model,
                tokenizer,
                prompt_ids,
                max_new_tokens,
                streamer=Queued(tokenizer, True, skip_special_tokens=True),
                stopping_criteria=[lambda found, *_, **__: torch.full((1,), ended, device=found.device)],
            )
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = Thread(target=generate, name="generation", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        ended = True
        thread.join()


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int, **options: Any) -> torch.Tensor:
    ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    room = int(getattr(model.config, "max_position_embeddings", 0) or 2**20) - len(prompt_ids)
    generated: torch.Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(max_new_tokens, room)),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return generated
