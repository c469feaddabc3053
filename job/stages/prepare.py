"""Stage prepare: download/{model,dataset,eval_dataset} → prepare/{train,eval,tokenizer}, data_report.json, data_report.html."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from job.data import report as reports
from job.data.chat_template import ChatTemplate
from job.data.check import reading_of, recognised
from job.data.chosen_rows import Source, assign, count_rows, held_out, places_of, sampled
from job.data.engine import Encoded, RowEncoder, cores, encode_all
from job.data.files import FileOptions
from job.data.formats import Format
from job.data.masking import Encoder, TrainOn, checked_prompt
from job.data.page import page
from job.data.prepared import writing
from job.data.rendering import PINNED_DATE
from job.data.report import SplitReport
from job.data.selection import select
from job.data.templates import (
    NO_TEMPLATE,
    NO_TEMPLATE_NOR_BOS,
    add_tokens,
    load_tokenizer,
    set_chat_template,
    templates_of,
    vocabulary_of,
)
from job.environment.mixture import Part, evaluation_part, held_out_fraction, training_parts
from job.errors import InputError
from job.guard.limits import limit_files
from job.report.events import message, output, progress
from job.run import Run, read_json, write_json
from job.settings import Settings, default_value
from job.stages.children import no_child_killed
from job.stages.inputs import digest
from job.stages.turn import await_turn

_DEFAULT_LENGTH = 1024
_UNTIL_TOLD = 20_000  # rows between two reports of progress


def prepare(run: Run) -> None:
    """Tokenize the training and evaluation rows once, with labels, and save them as Arrow."""
    _import_the_rest()
    await_turn(run, "prepare")
    limit_files(shutil.disk_usage(run.paths.run_dir).free)
    settings, paths = run.settings, run.paths
    tokenizer = load_tokenizer(paths.model_dir)
    name = set_chat_template(tokenizer, settings.chat_template)
    add_tokens(tokenizer, settings.new_tokens)
    config = read_json(paths.model_dir / "config.json")
    known = vocabulary(config)
    if known is not None and settings.new_tokens:
        beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= known}
        if others := sorted(beyond.keys() - set(settings.new_tokens)):
            raise InputError(
                f"The tokenizer has {others[0]!r} ({beyond[others[0]]}), for which the model has no embedding, and FT_NEW_TOKENS would "
                f"have to give it one that is not trained: it has {known}.",
                "Name that token in FT_NEW_TOKENS instead of in the tokenizer's files, or remove it.",
            )
        known = max(known, vocabulary_of(tokenizer))
    if known is not None and tokenizer.pad_token_id >= known:
        message(
            f"The tokenizer's {tokenizer.pad_token} has no embedding: {tokenizer.eos_token} pads instead.", "warning"
        )
        tokenizer.pad_token = tokenizer.eos_token
    job = _Preparation(run, tokenizer, name, templates_of(tokenizer), row_length(settings, config), known)
    for prompt in settings.sample_prompts if "sample" in settings.stages else ():
        ids = checked_prompt(prompt, tokenizer, reading_of(settings))  # now rather than after the training
        length = len(ids)
        if known is not None and max(ids, default=0) >= known:
            raise InputError(
                f"A prompt of FT_SAMPLE_PROMPTS has the token {tokenizer.convert_ids_to_tokens(max(ids))!r} ({max(ids)}) in the chat "
                f"template, and the model has embeddings for {known} only.",
                "Use the tokenizer that belongs to the model, or set FT_CHAT_TEMPLATE to a template without such tokens.",
            )
        if length >= (most := int(config.get("max_position_embeddings") or 2**20)):
            raise InputError(
                f"A prompt of FT_SAMPLE_PROMPTS has {length:,} tokens, and the model reads {most:,} at most.",
                "Shorten it.",
            )
    job.work()
    tokenizer.save_pretrained(paths.tokenizer_dir)
    if any(name.startswith("gguf") for name in settings.export if "export" in settings.stages):
        from job.model.exports.gguf_vocabulary import Vocabulary

        Vocabulary.of(paths.tokenizer_dir, known or 0)  # now rather than after the training


def _import_the_rest() -> None:
    """Import early what takes seconds. For a Llama's tokenizer, transformers imports most of itself."""
    importlib.import_module("transformers.models.llama.configuration_llama")


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


def vocabulary(model_config: Mapping[str, Any]) -> int | None:
    """The number of the model's embeddings, if its configuration says it."""
    text = model_config.get("text_config")
    found = model_config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    return int(found) if isinstance(found, int) else None


def what_is_learned(settings: Settings, chosen: Format) -> TrainOn:
    """FT_TRAIN_ON, or what it is by default: the assistant's part of conversations, all of plain text.

    Raises InputError if it asks for the assistant's part of rows that have none.
    """
    if settings.train_on != "auto":
        if settings.train_on != "all" and chosen.name == "text":
            raise InputError(
                f"FT_TRAIN_ON={settings.train_on}, but text rows are learned as they are: no part of them is the assistant's.",
                "Unset FT_TRAIN_ON, or set FT_DATASET_FORMAT to take the texts apart: llama2 for [INST] … [/INST], human_assistant for ### Human: ….",
            )
        return settings.train_on
    if settings.completion_only_loss is False and chosen.name == "prompt_completion":
        return "all"
    if settings.assistant_only_loss != "auto" and chosen.chat:
        return "assistant" if settings.assistant_only_loss else "all"
    before = os.environ.get("JOB_TRAIN_ON") == "all"  # a run that an earlier version started
    default_recipe = settings.dataset_name == default_value("dataset_name")
    return "all" if chosen.name == "text" or (chosen.chat and (before or default_recipe)) else "assistant"


_WORDS: dict[TrainOn, str] = {"all": "everything", "assistant": "the assistant's part", "last": "the last answer"}


@dataclass
class _Preparation:
    """The work of the stage, for one tokenizer and template."""

    run: Run
    tokenizer: Any
    template_name: str
    templates: tuple[ChatTemplate, ChatTemplate | None]
    max_length: int
    vocabulary: int | None

    def work(self) -> None:
        settings, paths = self.run.settings, self.run.paths
        report: dict[str, Any] = {
            "chat_template": self.template_name,
            "max_length": self.max_length,
            "packed": settings.packing,
            "deduplicated": settings.deduplicate,
            "inputs": digest(self.run),
        }
        splits: dict[str, SplitReport] = {}
        for name, sources, target in self._splits():
            self.run.check_stop()
            splits[name], report[name] = self._prepare(name, sources, target)
        if "eval" in splits:
            report["overlap"] = reports.overlap(splits["train"], splits["eval"])
        for level, text in reports.lines(report, list(splits)):
            message(text, level)
        write_json(paths.data_report_file, report)
        title = f"{settings.new_model_name}: {', '.join(sorted(splits))}"
        paths.data_page_file.write_text(page(report, list(splits), title), encoding="utf-8", errors="backslashreplace")
        output("data report", str(paths.data_page_file))

    # -- which rows --------------------------------------------------------------------------------------------------

    def _splits(self) -> Iterator[tuple[str, list[Source], Path]]:
        settings, paths = self.run.settings, self.run.paths
        train = [
            self._source(part, folder, "FT_DATASET_SPLIT")
            for part, folder in training_parts(settings, paths.dataset_dir)
        ]
        fraction = held_out_fraction(settings)
        counts = [count_rows(source) for source in train] if settings.dataset_sample or fraction else []
        used = sampled(sum(counts), settings)
        held = None
        if fraction is not None and used is not None:
            held, copies = held_out(used, places_of(train, counts), fraction, settings.seed)
            if not (used & ~copies).any():
                raise InputError(
                    f"FT_EVAL_SPLIT={settings.eval_split} of {int(used.sum()):,} rows leaves none to train on.",
                    "Lower or unset it, or add rows.",
                )
            assign(train, counts, used & ~copies)
        elif used is not None and settings.dataset_sample:
            assign(train, counts, used)
        yield "train", train, paths.train_data_dir
        if held is not None:
            assign(train, counts, held)
            yield "eval", train, paths.eval_data_dir
            return
        found = evaluation_part(settings, paths.dataset_dir, paths.eval_dataset_dir)
        if found is not None:
            yield "eval", [self._source(*found, "FT_EVAL_SPLIT")], paths.eval_data_dir

    def _source(self, part: Part, folder: Path, variable: str) -> Source:
        """A dataset whose format is known. Raises InputError if it is none that can be trained on."""
        settings = self.run.settings
        reading = reading_of(settings)
        options = FileOptions(settings.dataset_encoding, settings.dataset_separator, None, reading.tell)
        selection = select(folder, part.split, part.config, options, variable=variable)
        chosen, columns = recognised(selection, options, settings, reading)
        return Source(selection, replace(options, columns=columns), chosen, reading, part.weight)

    # -- what becomes of them ----------------------------------------------------------------------------------------

    def _prepare(self, name: str, sources: Sequence[Source], target: Path) -> tuple[SplitReport, dict[str, Any]]:
        settings = self.run.settings
        added = set(self.tokenizer.added_tokens_decoder)
        split = SplitReport(
            name,
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            frozenset({*added, self.tokenizer.eos_token_id}),
            frozenset(
                token
                for text in ("\n", "\n\n", " ", "\r\n")
                for token in self.tokenizer.encode(text, add_special_tokens=False)
            ),
        )
        packed = settings.packing and name == "train"
        learned: dict[str, None] = {}
        with writing(target, packed=packed, max_length=self.max_length) as writer, no_child_killed("prepare"):
            for source in sources:
                train_on = what_is_learned(settings, source.format)
                learned[_WORDS[train_on]] = None
                work = RowEncoder(
                    source.format,
                    source.reading,
                    Encoder(
                        self.tokenizer, self.templates[0], train_on=train_on, tool_template=self.templates[1], tell=source.reading.tell
                    ),
                    self.max_length,
                    settings.too_long,
                )  # fmt: skip
                before = dict(source.reading.told)
                for encoded in encode_all(source.batches(), work, cores(), self.run.check_stop):
                    split.count(encoded)
                    self._tell_progress(split, encoded)
                    ids, marks, starts = _kept(
                        encoded, split.fresh(encoded, drop=settings.deduplicate and name == "train")
                    )
                    split.add(ids, marks, starts)
                    writer.add(ids, marks, starts)
                for text in before:
                    split.told.setdefault(text, 1)
        formats = ", ".join(dict.fromkeys(source.format.name for source in sources))
        if name == "train" and settings.system_prompt is not None and split.documents and not split.conversations:
            raise InputError(
                f"FT_SYSTEM_PROMPT is set, but no {name} row is a conversation that it could begin.",
                'Unset it, or name the columns of questions and answers: FT_DATASET_COLUMNS={"question": …, "answer": …}.',
            )
        self._tell_of_template(split, any(source.format.chat for source in sources))
        split.refuse_bad_rows(settings.bad_rows, settings.max_bad_rows, formats)
        split.refuse_nonsense(
            max_length=self.max_length,
            too_long=settings.too_long,
            vocabulary=self.vocabulary,
            chat=all(source.format.chat for source in sources),
        )
        part = split.as_json(self.tokenizer, formats, ", ".join(learned))
        if packed:
            part |= {"packed_rows": writer.rows, "packed_length": self.max_length}
        return split, part

    def _tell_progress(self, split: SplitReport, encoded: Encoded) -> None:
        if split.rows // _UNTIL_TOLD != (split.rows - encoded.rows) // _UNTIL_TOLD:
            progress(split.rows, max(split.rows, self._estimate(split)), "rows")

    def _estimate(self, split: SplitReport) -> int:
        """About how many rows there are, by the bytes of the files and of the tokens so far."""
        folder = self.run.paths.eval_dataset_dir if split.name == "eval" else self.run.paths.dataset_dir
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        return int(total / max(1.0, 4.0 * split.tokens / split.rows))

    def _tell_of_template(self, split: SplitReport, chat: bool) -> None:
        if not chat:
            if self.run.settings.chat_template != "auto":
                message("FT_CHAT_TEMPLATE is used for prompts only: the rows are no conversations.", "warning")
            return
        if self.template_name in (NO_TEMPLATE, NO_TEMPLATE_NOR_BOS):
            named = "of Llama 2" if self.template_name == NO_TEMPLATE else "named ChatML"
            message(
                f"The model has no chat template: conversations are written in that {named}. Set FT_CHAT_TEMPLATE to choose another.",
                "warning",
            )
        if any(template is not None and template.dated for template in self.templates):
            split.told[f"the chat template's date is always {PINNED_DATE:%d %B %Y}"] += 1


def _kept(
    encoded: Encoded, keep: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The documents to keep, one after another, and their offsets with the end of the last."""
    ids, learned, lengths = encoded.ids, encoded.learned, encoded.lengths
    if not keep.all():
        tokens = np.repeat(keep, lengths)
        ids, learned, lengths = ids[tokens], learned[tokens], lengths[keep]
    return ids, learned, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
