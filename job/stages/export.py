"""Stage export: merge/model → export/files, exports.json: the formats of FT_EXPORT, each proved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from job.data.check import reading_of
from job.data.conversations import opened
from job.data.masking import checked_prompt, rendered_prompt
from job.data.ollama import modelfile
from job.data.report import learned_ends
from job.data.templates import load_tokenizer
from job.errors import InputError
from job.model.compute import Compute
from job.model.exports import BARS
from job.model.exports.fp8 import write_fp8
from job.model.generation import greedy
from job.model.merge_proof import Predictions, Rows
from job.report.events import message, output, progress
from job.run import Run, read_json, write_json

_ANSWER_TOKENS = 40
_LONGEST_PROMPT = 1024
_UNDECIDED = 0.05  # nats between two tokens
_PROBES = (
    "In 1897 and 2026: 3.14159, 1,000,000 km", "def f(x):\n    if x:\n        return  1\n\n\n\ty = 3", "naïve 漢字 🙂 — don't, WE'LL", "  two blanks",
)  # fmt: skip


def export(run: Run) -> None:
    """Write the merged model in each format, load it as its users will, and fail if it answers otherwise."""
    config = read_json(run.paths.merged_dir / "config.json")
    compute = Compute.of(run.settings, local_rank=run.node.local_rank, config=config)
    reference = _Reference(run, compute)
    run.paths.exports_dir.mkdir(parents=True)
    found: list[dict[str, Any]] = []
    for number, kind in enumerate(run.settings.export, 1):
        run.check_stop()
        place = run.paths.exports_dir / _name(run, kind)
        if kind == "fp8":
            write_fp8(run.paths.merged_dir, place, run.check_stop)
            found.append({"format": kind, "file": f"{place.name}/", **prove_fp8(place, reference, compute)})
        else:
            write(run, kind, place, reference)
            found.append({"format": kind, "file": place.name, **prove(kind, place, reference)})
        write_json(run.paths.exports_file, found)
        require_equal(found[-1])
        progress(number, len(run.settings.export), "formats")
        message(
            f"{found[-1]['file']}: KL {found[-1]['mean_kl_nats']:.1e} nats/token from the merged model, top-1 agreement {found[-1]['same_first_choice']:.1%}, "
            f"{found[-1]['same_answers']} of {found[-1]['answers']} answers alike."
        )
        output("export", str(place))
    first = next((item["file"] for item in found if item["file"].endswith(".gguf")), None)
    if first is not None:
        text = modelfile(reference.tokenizer, f"./{first}", reference.system, learned_ends(run.paths.data_report_file))
        (run.paths.exports_dir / "Modelfile").write_text(text, encoding="utf-8")


def _name(run: Run, kind: str) -> str:
    name = run.settings.new_model_name.rsplit("/", 1)[-1]
    return kind if kind == "fp8" else f"{name}.{kind.removeprefix('gguf-').upper()}.gguf"


class _Reference:
    """The merged model's own predictions and greedy answers for the sample prompts."""

    def __init__(self, run: Run, compute: Compute) -> None:
        self.folder = run.paths.merged_dir
        self.tokenizer: Any = load_tokenizer(self.folder)
        self.asked, self.reading = run.settings.sample_prompts or _PROBES, reading_of(run.settings)
        self.probes = [checked_prompt(probe, self.tokenizer, self.reading) for probe in _PROBES]
        self.probe_texts, self.texts = (self.rendered(self.tokenizer, texts) for texts in (_PROBES, self.asked))
        self.prompts = [checked_prompt(prompt, self.tokenizer, self.reading)[:_LONGEST_PROMPT] for prompt in self.asked]
        opening = opened([{"role": "user", "content": ""}], self.reading)[0]
        self.system = opening["content"] if opening["role"] == "system" else None
        self.begins = all(ids[:1] == [self.tokenizer.bos_token_id] for ids in self.prompts)
        model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype="float32", device_map={"": compute.device}
        ).eval()
        model.generation_config = greedy(model)  # its own may punish repetitions, which no other program does unasked
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.answers = [_answer(model, ids, self.ends) for ids in self.prompts]
        rows = [prompt + answer for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        self.rows = Rows(rows, [[-100] * len(row) for row in rows])
        self.predictions = Predictions.of(model, self.rows)

    def rendered(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        return [rendered_prompt(prompt, tokenizer, self.reading) for prompt in prompts]

    def compared(self, predicted: Predictions, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The figures of an export's predictions and answers."""
        return {
            **self.predictions.distance_to(predicted),
            "answers": len(answers),
            "same_answers": sum(list(one) == other for one, other in zip(answers, self.answers, strict=True)),
            "different_answers": sum(self.chose_otherwise(number, answer) for number, answer in enumerate(answers)),
        }

    def chose_otherwise(self, number: int, answer: Sequence[int]) -> bool:
        """Whether an answer takes another way than the merged model's where that was not undecided itself."""
        ours = self.answers[number]
        at = next((place for place, (one, other) in enumerate(zip(ours, answer, strict=False)) if one != other), None)
        if at is None:
            return False
        predicted = self.predictions.log_probabilities[number][len(self.prompts[number]) - 1 + at]
        return float(predicted[ours[at]] - predicted[answer[at]]) > _UNDECIDED


@torch.inference_mode()
def _answer(model: Any, prompt: Sequence[int], ends: set[int]) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_ANSWER_TOKENS, do_sample=False
    )
    found: list[int] = generated[0, len(prompt) :].tolist()
    return [token for token in found if token not in ends]


def write(run: Run, kind: str, file: Path, reference: _Reference) -> None:
    """Write one format. llama.cpp's own types are made from a file that holds the weights as they are."""
    from gguf import GGMLQuantizationType

    from job.model.exports.gguf_file import write_gguf
    from job.model.exports.llama_cpp import quantize

    types = {"gguf-f16": GGMLQuantizationType.F16, "gguf-q8_0": GGMLQuantizationType.Q8_0}
    whole = file if kind in types else file.with_suffix(".whole")
    stored = {"float16": GGMLQuantizationType.F16, "bfloat16": GGMLQuantizationType.BF16}
    dtype = read_json(reference.folder / "config.json")["torch_dtype"]
    chosen = types.get(kind, stored.get(dtype, GGMLQuantizationType.F32))
    write_gguf(reference.folder, whole, chosen, reference.tokenizer, begins=reference.begins, go_on=run.check_stop)
    if whole != file:
        quantize(whole, file, kind)
        whole.unlink()


def prove(kind: str, file: Path, reference: _Reference) -> dict[str, Any]:
    """How far the written file is from the merged model, in llama.cpp: prompts, predictions and answers."""
    from job.model.exports.llama_cpp import LlamaCpp, rounded_up

    model = LlamaCpp(file, rounded_up(max(map(len, reference.rows.ids)) + _ANSWER_TOKENS))
    try:
        bos = reference.tokenizer.bos_token or ""
        texts = [
            text.removeprefix(bos) if reference.begins else text for text in (*reference.texts, *reference.probe_texts)
        ]
        asked = [*reference.prompts, *reference.probes]
        read = [model.tokens(text)[: len(ids) + 1] for text, ids in zip(texts, asked, strict=True)]
        predicted = Predictions([model.log_probabilities(ids) for ids in reference.rows.ids])
        answers = [model.answer(ids, _ANSWER_TOKENS, reference.ends) for ids in reference.prompts]
        return {
            **reference.compared(predicted, answers),
            "prompts": len(asked),
            "same_prompts": sum(one[:_LONGEST_PROMPT] == ids for one, ids in zip(read, asked, strict=True)),
            "same_template": model.chat_template == reference.tokenizer.chat_template,
        }
    finally:
        model.close()


def prove_fp8(folder: Path, reference: _Reference, compute: Compute) -> dict[str, Any]:
    """How far the written folder is from the merged model, loaded by transformers with compressed-tensors."""
    tokenizer: Any = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map={"": compute.device}).eval()
    model.generation_config = greedy(model)
    answers = [_answer(model, ids, reference.ends) for ids in reference.prompts]
    asked = reference.rendered(tokenizer, (*reference.asked, *_PROBES))
    return {
        **reference.compared(Predictions.of(model, reference.rows), answers),
        "prompts": len(asked),
        "same_prompts": sum(
            one == other for one, other in zip(asked, (*reference.texts, *reference.probe_texts), strict=True)
        ),
        "same_template": tokenizer.chat_template == reference.tokenizer.chat_template,
    }


def require_equal(found: dict[str, Any]) -> None:
    """Raise InputError with the figures if an export is not the merged model."""
    most, answers = BARS[found["format"]]
    faults = []
    if found["same_prompts"] < found["prompts"]:
        faults.append("it reads prompts as other tokens")
    if not found["same_template"]:
        faults.append("its chat template is another one")
    if not found["mean_kl_nats"] <= most:
        faults.append(f"its predictions differ by KL {found['mean_kl_nats']:.2g} nats/token, and {most:g} is the most")
    elif answers and found["different_answers"]:
        faults.append(f"{found['different_answers']} of {found['answers']} greedy answers are other ones")
    if faults:
        raise InputError(
            f"FT_EXPORT: {found['file']} differs from the merged model: {'; '.join(faults)}.",
            f"Nothing was published yet; adapter and merged model are intact. Leave {found['format']} out of FT_EXPORT to publish without it.",
        )
