"""Stage prepare: download/{model,dataset,eval_dataset} → prepare/{train,eval,tokenizer}, data_report.json."""

from __future__ import annotations

import importlib
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from pyarrow.lib import ArrowException

from job.data.formats import (
    Example,
    Format,
    Malformed,
    choose_format,
    evaluation_split,
    held_out_fraction,
    load_split,
)
from job.data.masking import IGNORED, encode
from job.data.templates import load_tokenizer, set_chat_template
from job.errors import InputError, in_a_line
from job.guard.limits import TooMuch, limit_files, time_limit
from job.report.events import message
from job.run import Run, read_json, write_json
from job.settings import Settings
from job.stages.turn import await_turn

_DEFAULT_LENGTH = 1024
_LONGEST_TEXT = 4 << 20  # characters of a row; the tokenizer takes some 200 bytes for each
_ROW_SECONDS = 20.0
_MALFORMED_LIMIT = 0.1  # above this share the format was probably guessed wrong, and dropping rows would hide it


def prepare(run: Run) -> None:
    """Tokenize the training and evaluation rows once, with labels, and save them as Arrow."""
    _import_the_rest(run.settings)
    await_turn(run, "prepare")
    disable_progress_bars()
    limit_files(shutil.disk_usage(run.paths.run_dir).free)
    settings, paths = run.settings, run.paths
    tokenizer = load_tokenizer(paths.model_dir)
    template = set_chat_template(tokenizer, settings.chat_template)
    max_length = row_length(settings, read_json(paths.model_dir / "config.json"))
    report: dict[str, Any] = {"chat_template": template, "max_length": max_length, "packed": settings.packing}
    for name, rows, target in _splits(run):
        run.check_stop()
        try:
            report[name] = _prepare_rows(run, name, rows, target, tokenizer, max_length)
        except (UnicodeError, ArrowException, OverflowError) as error:
            raise InputError(
                f"The {name} rows cannot be read: {in_a_line(error)}", "Repair the data files, or leave the rows out."
            ) from error
    tokenizer.save_pretrained(paths.tokenizer_dir)
    write_json(paths.data_report_file, report)


def _import_the_rest(settings: Settings) -> None:
    """Import early what takes seconds. For a Llama's tokenizer, transformers imports most of itself."""
    importlib.import_module("transformers.models.llama.configuration_llama")
    if settings.packing:
        importlib.import_module("job.data.packing")


def row_length(settings: Settings, model_config: dict[str, Any]) -> int:
    """The longest row in tokens. Raises InputError if FT_MAX_SEQ_LENGTH is more than the model supports."""
    limit = int(model_config.get("max_position_embeddings") or 2**20)
    if settings.max_seq_length == "auto":
        return min(_DEFAULT_LENGTH, limit)
    if settings.max_seq_length > limit:
        raise InputError(
            f"FT_MAX_SEQ_LENGTH={settings.max_seq_length} is more than the model's {limit} positions.",
            f"Set it to {limit} or less.",
        )
    return settings.max_seq_length


def _splits(run: Run) -> list[tuple[str, Dataset, Path]]:
    settings, paths, cache = run.settings, run.paths, run.paths.datasets_cache_dir
    rows = load_split(paths.dataset_dir, settings.dataset_split, settings.dataset_config, cache)
    fraction, named = held_out_fraction(settings), evaluation_split(settings)
    if fraction is not None and settings.eval_dataset_name is None:
        parts = rows.train_test_split(test_size=fraction, seed=settings.seed)
        return [("train", parts["train"], paths.train_data_dir), ("eval", parts["test"], paths.eval_data_dir)]
    if named is None:
        return [("train", rows, paths.train_data_dir)]
    folder = paths.eval_dataset_dir if settings.eval_dataset_name else paths.dataset_dir
    return [
        ("train", rows, paths.train_data_dir),
        ("eval", load_split(folder, named, settings.dataset_config, cache), paths.eval_data_dir),
    ]


def _prepare_rows(run: Run, name: str, rows: Dataset, target: Path, tokenizer: Any, max_length: int) -> dict[str, Any]:
    settings = run.settings
    sample = [rows[index] for index in range(min(20, len(rows)))]
    row_format = choose_format(settings.dataset_format, settings.dataset_text_field, rows.column_names, sample)
    encoded = _encode_all(settings, rows, row_format, tokenizer)
    reasons = [reason for reason in encoded["malformed"] if reason]
    if len(reasons) > _MALFORMED_LIMIT * len(rows):
        raise InputError(
            f"{len(reasons)} of {len(rows)} {name} rows are malformed as {row_format.name}: {reasons[0]}.",
            "Set FT_DATASET_FORMAT to the format of the rows, or fix the rows.",
        )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    cut = encoded.remove_columns("malformed").map(_cut, fn_kwargs={"max_length": max_length}, batched=True)
    kept = cut.filter(lambda labels: any(label != IGNORED for label in labels[1:]), input_columns="labels")
    if len(kept) == 0:
        raise InputError(
            f"No {name} row has any token left to learn.", "Raise FT_MAX_SEQ_LENGTH: the prompts alone fill it."
        )
    report = {
        "lengths": dict(sorted(Counter(map(len, kept["input_ids"])).items())),
        "format": row_format.name,
        "rows": len(kept),
        "malformed_rows": len(reasons),
        "unlearnable_rows": len(rows) - len(reasons) - len(kept),
        "truncated_rows": sum(length > max_length for length in lengths),
        "tokens": sum(map(len, kept["input_ids"])),
        "learned_tokens": sum(label != IGNORED for labels in kept["labels"] for label in labels[1:]),
        "longest_row": max(lengths),
        "first_row": _preview(kept[0], tokenizer),
    }
    if settings.packing and name == "train":
        from job.data.packing import pack  # trl takes seconds to import

        kept = pack(kept, max_length)
        report["packed_rows"] = len(kept)
    kept.save_to_disk(target)
    _tell(name, report, reasons, max_length)
    return report


def _encode_all(settings: Settings, rows: Dataset, row_format: Format, tokenizer: Any) -> Dataset:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            example = row_format.read(row, settings.dataset_text_field)
            if (size := _characters(example)) > _LONGEST_TEXT:
                raise Malformed(f"it has {size:,} characters, and {_LONGEST_TEXT:,} are the most")
            with time_limit(_ROW_SECONDS, "rendering and tokenizing it"):
                encoding = encode(
                    example,
                    tokenizer,
                    completion_only=settings.completion_only_loss,
                    assistant_only=settings.assistant_only_loss,
                )
        except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
            raise
        except BaseException as error:  # a template is a program, and the tokenizer's Rust panics with a BaseException
            reason = str(error) if isinstance(error, Malformed | TooMuch) else in_a_line(error)
            return {"input_ids": [], "labels": [], "malformed": reason or "it cannot be rendered"}
        return {**asdict(encoding), "malformed": ""}

    processes = min(os.cpu_count() or 1, len(rows) // 5000) or None
    return rows.map(one, remove_columns=rows.column_names, num_proc=processes)


def _characters(example: Example) -> int:
    texts = [
        example.text or "",
        example.completion or "",
        *(text for turn in example.messages or () for text in turn.values()),
    ]
    return sum(map(len, texts))


def _cut(batch: dict[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    return {name: [values[:max_length] for values in batch[name]] for name in ("input_ids", "labels")}


def _preview(row: dict[str, list[int]], tokenizer: Any) -> dict[str, str]:
    """The first row as text: all of it, and the part that is learned."""
    learned = [label for label in row["labels"] if label != IGNORED]
    return {"text": tokenizer.decode(row["input_ids"]), "learned": tokenizer.decode(learned)}


def _tell(name: str, report: dict[str, Any], reasons: list[str], max_length: int) -> None:
    text = f"{name}: {report['rows']:,} rows as {report['format']}, {report['tokens']:,} tokens, {report['learned_tokens']:,} learned"
    message(text + (f", packed into {report['packed_rows']:,} rows" if "packed_rows" in report else ""))
    if report["truncated_rows"]:
        message(
            f"{report['truncated_rows']:,} {name} rows are longer than {max_length} tokens and were cut.", "warning"
        )
    if reasons:
        message(f"{len(reasons)} malformed {name} rows were left out. The first: {reasons[0]}", "warning")
