"""Tokenizers and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from job.data.chat_template import ChatTemplate
from job.data.rendering import has_marks
from job.data.sentencepiece_model import convert
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
    leading space that Llama 2 was trained with. If the class and the file disagree, the file is right. Where there is
    only a `tokenizer.model`, SentencePiece is right.
    """
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, **({} if file.is_file() else {"legacy": True})
        )
        if file.is_file():
            if not _encodes_as(tokenizer, tokenizers.Tokenizer.from_file(str(file))):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        elif model.is_file() and (converted := convert(model)) is not None:
            tokenizer = _with_backend(tokenizer, converted)
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


def _encodes_as(tokenizer: Any, truth: tokenizers.Tokenizer) -> bool:
    """Whether two tokenizers agree on texts that transformers' classes are known to get wrong: blanks and marks."""
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    probes = (f"{bos}[INST] A question? [/INST] An answer. {eos}", f" a{eos} b{eos}  c\n   d", f"{bos}e  f\tg")
    return all(
        tokenizer.encode(probe, add_special_tokens=False) == truth.encode(probe, add_special_tokens=False).ids
        for probe in probes
    )


def _with_backend(tokenizer: Any, backend: tokenizers.Tokenizer) -> Any:
    """The same tokenizer, encoding with `backend`."""
    known = set(backend.get_vocab(with_added_tokens=True))
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content not in known]
    backend.add_tokens(added)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A" + (f" {eos}" if getattr(tokenizer, "add_eos_token", False) else ""),
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )


NO_TEMPLATE = "llama-2, because the model has no chat template"
NO_TEMPLATE_NOR_BOS = "chatml, because the model has no chat template, and no begin-of-sequence token"


def set_chat_template(tokenizer: Any, wanted: str) -> str:
    """Set the template that FT_CHAT_TEMPLATE names, and return the name of the one chosen."""
    if wanted == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own"
        if not tokenizer.bos_token:  # Llama 2's begins each turn with it
            tokenizer.chat_template = CHATML
            return NO_TEMPLATE_NOR_BOS
        tokenizer.chat_template = LLAMA_2
        return NO_TEMPLATE
    if wanted in NAMED:
        tokenizer.chat_template = NAMED[wanted]
        return wanted
    path = Path(wanted).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"FT_CHAT_TEMPLATE={wanted!r} is neither a file nor a known template.",
            f"Use auto, {', '.join(NAMED)}, or a Jinja file.",
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
    return path.name


def add_tokens(tokenizer: Any, new: Sequence[str]) -> None:
    """Add the tokens of FT_NEW_TOKENS. Raises SettingsError for one that is there, or that is part of another."""
    known = tokenizer.get_vocab()
    for token in new:
        if token in known or len(token.strip()) < 2:
            reason = f"is in the vocabulary already, as {known[token]}" if token in known else "is too short"
            raise SettingsError(f"FT_NEW_TOKENS names {token!r}, which {reason}.", "Leave it out, or choose another.")
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in new])


def vocabulary_of(tokenizer: Any) -> int:
    """The embeddings that a tokenizer needs. Its ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def new_token_ids(tokenizer: Any, new: Sequence[str]) -> list[int]:
    """The ids of the tokens that FT_NEW_TOKENS added to the tokenizer of a run."""
    return [int(number) for number in tokenizer.convert_tokens_to_ids(list(new))]


def templates_of(tokenizer: Any) -> tuple[ChatTemplate, ChatTemplate | None]:
    """The tokenizer's chat template, and the one that it has for conversations with tools, if that is another."""
    own = tokenizer.chat_template
    variants = own if isinstance(own, dict) else {"default": own}
    default = variants.get("default") or next(iter(variants.values()))
    tools = variants.get("tool_use")
    tokens = dict(tokenizer.special_tokens_map)
    return (
        ChatTemplate(default, tokens, _training_variant(tokenizer, default)),
        ChatTemplate(tools, tokens) if tools else None,
    )


def _training_variant(tokenizer: Any, text: str) -> str | None:
    """TRL's variant of a known template, with marks around what the assistant writes. None if it has none."""
    if has_marks(text) or text in NAMED.values():
        return None
    from trl import chat_template_utils  # takes seconds to import

    known = (value for name, value in vars(chat_template_utils).items() if name.endswith("_chat_template"))
    if text not in known:  # TRL would try it on conversations of its own, and a stranger's template may never end
        return None
    try:
        found: str | None = chat_template_utils.get_training_chat_template(tokenizer)
    except ValueError:  # a model that TRL knows, and has no variant for
        return None
    return found
