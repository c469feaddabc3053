"""What prepared rows were made from, as one number: another dataset, tokenizer, template or setting gives another."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path

from job.run import Run

_VERSION = 2  # of how rows become tokens
_OF_THE_MODEL = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
)  # fmt: skip


def digest(run: Run) -> str:
    """BLAKE2b of the settings and of the content of every downloaded file that the stage prepare reads."""
    found = hashlib.blake2b(json.dumps([_VERSION, run.fingerprint("prepare")]).encode())
    folders = (run.paths.dataset_dir, run.paths.eval_dataset_dir, run.paths.model_dir)
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            if path.is_file() and (folder != run.paths.model_dir or _is_read(path.name)):
                name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
                found.update(f"{name}\0{_hash(path)}\n".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def _is_read(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in _OF_THE_MODEL)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
