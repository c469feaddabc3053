"""Tokenizers and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from job.errors import InputError, SettingsError, in_a_line

# Meta's format for Llama-2-chat: https://github.com/meta-llama/llama (llama/generation.py, chat_completion)
LLAMA_2 = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for turn in turns -%}"
    "{%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}"
    "{{- raise_exception('turns must alternate user/assistant, beginning with user') -}}{%- endif -%}"
    "{%- if turn['role'] == 'user' -%}"
    "{{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + turn['content'].strip() + ' ' + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
# https://github.com/openai/openai-python/blob/release-v0.28.1/chatml.md, plus the tokenizer's own BOS at the start
# and its EOS after each answer, if they differ from ChatML's. To a Llama-2 tokenizer <|im_end|> is plain text, so it would
# never stop generation.
CHATML = (
    "{%- if bos_token and bos_token != '<|im_start|>' -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- if message['role'] == 'assistant' and eos_token != '<|im_end|>' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NAMED = {"llama-2": LLAMA_2, "chatml": CHATML}


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder so that it encodes exactly as its `tokenizer.json` says.

    transformers' Llama class rebuilds the tokenizer and, unless `legacy` is true, encodes `<s>[INST]` without the
    leading space that Llama 2 was trained with. If the class and the file disagree, the file is right.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({} if file.is_file() else {"legacy": True})
        )
        if file.is_file():
            probe = f"{tokenizer.bos_token or ''}[INST] A question? [/INST] An answer. {tokenizer.eos_token or ''}"
            truth = tokenizers.Tokenizer.from_file(str(file)).encode(probe, add_special_tokens=False).ids
            if tokenizer.encode(probe, add_special_tokens=False) != truth:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except BaseException as error:  # the files are a stranger's, and the tokenizers library panics with a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise InputError(
            f"The tokenizer in {folder} cannot be loaded: {in_a_line(error)}",
            "Check the model's tokenizer files and its config.json.",
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer in {folder} has no fast version.",
            "Convert it: AutoTokenizer.from_pretrained(…).save_pretrained(…).",
        )
    if tokenizer.eos_token is None:
        raise InputError(
            f"The tokenizer in {folder} has no end-of-sequence token.", "Set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so a real </s> is still learned
    tokenizer.padding_side = "right"
    return tokenizer


def set_chat_template(tokenizer: Any, wanted: str) -> str:
    """Set the template that FT_CHAT_TEMPLATE names, and return the name of the one chosen."""
    if wanted == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own"
        wanted = "llama-2"
    if wanted in NAMED:
        tokenizer.chat_template = NAMED[wanted]
        return wanted
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"FT_CHAT_TEMPLATE={wanted!r} is neither a file nor a known template.",
            f"Use auto, {', '.join(NAMED)}, or a Jinja file.",
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return path.name
