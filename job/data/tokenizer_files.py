"""The tokenizer of a published model: the base's own files, as other programs know them, with the chosen chat template.

transformers writes a tokenizer in its own way when it saves one, under a class of one version and without what it does not know,
so that older versions of it, and llama.cpp's converter, cannot read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from job.data.masking import checked_prompt
from job.data.templates import load_tokenizer

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
_OF_VERSION_5, _GENERAL = "TokenizersBackend", "PreTrainedTokenizerFast"
_ADDED_BY_VERSION_5 = ("backend", "is_local", "local_files_only")
_PROBES = ("[INST] A question? [/INST] An answer.", "  two blanks\n    four", "naïve 漢字 🙂")


def publish_tokenizer(base: Path, trained: Path, target: Path) -> None:
    """Write to `target` the tokenizer of the model in `base`, with the chat template of the one in `trained`.

    If transformers would encode otherwise with it than was trained, the files say how it must.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    used = load_tokenizer(trained)
    new = len(used) > len(load_tokenizer(base))  # FT_NEW_TOKENS
    if new or not (target / "tokenizer.json").is_file():
        used.backend_tokenizer.save(str(target / "tokenizer.json"))
    config_file = target / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if used.chat_template != load_tokenizer(base).chat_template:
        config["chat_template"] = used.chat_template
        (target / "chat_template.jinja").unlink(missing_ok=True)
    if (
        config.get("tokenizer_class") == _OF_VERSION_5
    ):  # the base was saved by it; older versions know the general class
        config = {name: value for name, value in config.items() if name not in _ADDED_BY_VERSION_5}
        config["tokenizer_class"] = _GENERAL
    if new and "added_tokens_decoder" in config:
        own = {str(number): _as_in_file(token) for number, token in used.added_tokens_decoder.items()}
        config["added_tokens_decoder"] = {**own, **config["added_tokens_decoder"]}
    for way in ({}, {"legacy": True}, {"tokenizer_class": _GENERAL}):
        config_file.write_text(json.dumps(config | way, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if _encodes_alike(target, used):
            return
    used.save_pretrained(target)  # no class and no file of the base's encodes as was trained


def difference(folder: Path, used: Any, prompts: Sequence[str]) -> str | None:
    """What the tokenizer in `folder` does otherwise than the one that was `used` for training: in words, or None."""
    try:
        found = load_tokenizer(folder)
    except Exception as error:
        return f"it cannot be loaded: {type(error).__name__}"
    if not _encodes_alike(folder, used):
        return "it encodes text otherwise"
    if any(checked_prompt(prompt, found) != checked_prompt(prompt, used) for prompt in (*prompts, *_PROBES)):
        return "its chat template renders prompts otherwise"
    if (found.eos_token_id, found.bos_token_id) != (used.eos_token_id, used.bos_token_id):
        return "its answers begin or end with another token"
    return None


def _as_in_file(token: Any) -> dict[str, Any]:
    """An added token as tokenizer_config.json has it."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _encodes_alike(folder: Path, used: Any) -> bool:
    """Whether transformers encodes with these files as the training did."""
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # it raises many kinds for files that do not belong together
        return False
    marks = f"{used.bos_token or ''}[INST] Hi [/INST] Ho {used.eos_token}"
    added = " ".join(token.content for _, token in sorted(used.added_tokens_decoder.items())[-20:])
    texts = (marks, added, *_PROBES)
    return all(
        found.encode(text, add_special_tokens=special) == used.encode(text, add_special_tokens=special)
        for text in texts
        for special in (False, True)
    )
