"""Talks with the model of a finished run, asked the way it was trained to be asked."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.environment.local_files import local_path
from job.errors import InputError, SettingsError
from job.guard.escape import for_terminal
from job.run import Run, read_json

_WELCOME = "Ask something. An empty line forgets the conversation; Ctrl-C stops an answer, or leaves; Ctrl-D leaves."


def chat(run: Run, which: str) -> None:
    """Answer prompts from the terminal, or a single one from standard input, and stream the answers.

    `which` is the `merged` model, the `base` with the `adapter` as trained, or the `base` alone. Raises SettingsError if this
    machine does not have it.
    """
    folder = _folder(run, which)
    told = sys.stderr if not sys.stdin.isatty() else sys.stdout
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print(f"Loading {folder} …", file=told, flush=True)
    try:
        answer = _loaded(run, which, folder)
        if not sys.stdin.isatty():
            prompt = sys.stdin.read().strip()
            if prompt:
                _say(answer([{"role": "user", "content": prompt}]))
            return
        _converse(answer)
    except KeyboardInterrupt:
        print(file=told)


def _converse(answer: Any) -> None:
    print(_WELCOME)
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("\n> ").strip()
        except EOFError:
            print()
            return
        if not prompt:
            messages = []
            print("(a new conversation)")
            continue
        messages.append({"role": "user", "content": prompt})
        said: list[str] = []
        try:
            _say(answer(messages), said)
        except KeyboardInterrupt:  # of the answer; the conversation goes on
            print(" …")
        except InputError as error:
            print(f"{error.message} {error.hint}")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": "".join(said)})


def _say(pieces: Iterator[str], said: list[str] | None = None) -> None:
    for piece in pieces:
        sys.stdout.write(for_terminal(piece))
        sys.stdout.flush()
        if said is not None:
            said.append(piece)
    print(flush=True)


def _folder(run: Run, which: str) -> Path:
    """Where the model is on this machine."""
    paths = run.paths
    places = [paths.merged_dir] if which == "merged" else [paths.model_dir]
    if which == "merged" and paths.published_file.is_file():
        places.append(Path(str(read_json(paths.published_file).get("destination", ""))))
    if which == "base" and (local := local_path(run.settings.model_name)) is not None:
        places.append(local)
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None or (which == "adapter" and not (paths.adapter_dir / "adapter_config.json").is_file()):
        raise SettingsError(
            f"Run {run.id!r} has no {which} model on this machine.",
            "Set FT_OUTPUT_DIR and FT_RUN_ID as they were for the run. To talk with a published folder, set FT_MODEL_NAME to it and "
            "run `python entrypoint.py chat --base`.",
        )
    return found


def _loaded(run: Run, which: str, folder: Path) -> Any:
    """A function from a conversation to the pieces of its answer."""
    from job.data.check import reading_of
    from job.data.conversations import opened
    from job.data.masking import prompt_ids
    from job.data.report import learned_ends
    from job.data.templates import load_tokenizer, set_chat_template, vocabulary_of
    from job.model.compute import Compute
    from job.model.generation import greedy, stream
    from job.model.loading import load_base

    trained = run.paths.tokenizer_dir  # with the chat template of the training, and FT_NEW_TOKENS
    tokenizer: Any = load_tokenizer(trained if which == "adapter" and trained.is_dir() else folder)
    if which == "base" and trained.is_dir():
        tokenizer.chat_template = load_tokenizer(trained).chat_template
    if not tokenizer.chat_template:
        set_chat_template(tokenizer, run.settings.chat_template)
    compute = Compute.of(run.settings, local_rank=0, config=read_json(folder / "config.json"))
    tokens = vocabulary_of(tokenizer) if run.settings.new_tokens and which == "adapter" else 0
    quantized = which == "adapter" and run.settings.use_4bit
    model: Any = load_base(folder, run.settings, compute, quantized=quantized, tokens=tokens)
    model.generation_config = greedy(model, learned_ends(run.paths.data_report_file))
    if which == "adapter":
        from job.model.adapters import with_adapter

        model = with_adapter(run.paths.adapter_dir, model)

    reading, most = reading_of(run.settings), int(getattr(model.config, "max_position_embeddings", 0) or 2**20)
    wanted = min(run.settings.sample_max_new_tokens, most // 4)

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        ids = prompt_ids(opened(messages, reading), tokenizer)
        while len(ids) + wanted > most and len(messages) > 2:
            print("(the beginning of the conversation no longer fits, and is forgotten)", file=sys.stderr)
            del messages[:2]
            ids = prompt_ids(opened(messages, reading), tokenizer)
        if len(ids) >= most:
            raise InputError(
                f"The prompt has {len(ids):,} tokens, and the model reads {most:,} at most.", "Ask something shorter."
            )
        return stream(model, tokenizer, ids, run.settings.sample_max_new_tokens)

    return answer
