"""llama.cpp, through the package llama-cpp-python: its quantizer, and a model as it computes it."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import torch

from job.errors import InputError

_TYPES = {"gguf-q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source` as one of llama.cpp's own types. Raises InputError if it cannot."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _TYPES[kind]
    parameters.nthread = len(os.sched_getaffinity(0))
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
    if code != 0:
        raise InputError(f"FT_EXPORT={kind}: llama.cpp could not quantize the model.", "The merged model is intact.")


class LlamaCpp:
    """A GGUF file, loaded on the CPU."""

    def __init__(self, file: Path, longest: int) -> None:
        try:
            self._model = llama_cpp.Llama(
                str(file), n_ctx=longest, n_batch=longest, n_threads=len(os.sched_getaffinity(0)), logits_all=True, verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"FT_EXPORT: llama.cpp cannot load {file.name}: {error}", "The merged model is intact."
            ) from error

    @property
    def chat_template(self) -> str | None:
        found: str | None = self._model.metadata.get("tokenizer.chat_template")
        return found

    def tokens(self, text: str) -> list[int]:
        """The ids of a rendered prompt, as a server gets them: with the first token that the file asks for."""
        own = self._model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        found: list[int] = self._model.tokenize(text.encode("utf-8"), add_bos=own, special=True)
        return found

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """Of the next token after every token: (len(ids), vocabulary), float32."""
        self._model.reset()
        self._model.eval(list(ids))
        return torch.log_softmax(torch.tensor(self._model.scores[: len(ids)]).float(), -1)

    def answer(self, ids: Sequence[int], most: int, ends: set[int]) -> list[int]:
        """The greedy continuation, without the token that ends it."""
        found: list[int] = []
        logits = self.log_probabilities(ids)[-1]
        while len(found) < most and (token := int(logits.argmax())) not in ends:
            found.append(token)
            self._model.eval([token])
            logits = torch.tensor(self._model.scores[len(ids) + len(found) - 1])
        return found

    def close(self) -> None:
        self._model.close()


def rounded_up(tokens: int) -> int:
    return math.ceil(tokens / 256) * 256
