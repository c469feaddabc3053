"""The model card: which model was trained on which data, how, and with what result."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from job import __version__
from job.environment.adapter_settings import with_adapters_own
from job.environment.local_files import public_name
from job.environment.mixture import dataset_parts
from job.guard.escape import for_cell, for_terminal
from job.report.goodput import speed_text, time_text
from job.run import Run, read_json
from job.settings import Settings, default_text, value_text, variable

_PROMPT_LIMIT = 8


@dataclass(frozen=True)
class Published:
    """What is published under which name: the merged model, the adapter, or both.

    `name` is the Hub id, or None for a folder or a bucket, and `revision` a branch beside the main one.
    """

    name: str | None
    revision: str | None
    merged: bool
    adapter: bool


def write_model_card(run: Run, published: Published, *, curve_file: str) -> str:
    """The README.md of what is published, as Markdown with the Hub's metadata at the top.

    It tells of samples, merge and exports as far as there are any.
    """
    settings, paths = run.settings, run.paths
    adapter = read_json(paths.adapter_dir / "adapter_config.json")
    if settings.adapter_name is not None:
        settings = with_adapters_own(settings, adapter)
    metrics, data, sources = (
        read_json(file) for file in (paths.metrics_file, paths.data_report_file, paths.sources_file)
    )
    samples = read_json(paths.samples_file) if paths.samples_file.is_file() else []
    proof = read_json(paths.merge_proof_file) if published.merged else None
    exports = read_json(paths.exports_file) if published.merged and paths.exports_file.is_file() else []
    title = settings.new_model_name.rsplit("/", 1)[-1]
    if run.takes_over:  # the data was for the proof alone
        sources = {name: source for name, source in sources.items() if not name.startswith("FT_DATASET_NAME")}
    parts = [
        f"---\n{_metadata(settings, sources, metrics, published, title).to_yaml()}\n---\n",
        f"# {title}\n",
        _what_it_is(settings, sources, published),
        _usage(
            published,
            sources["FT_MODEL_NAME"],
            _rank_to_serve(adapter),
            exports,
            settings.system_prompt if settings.system_role == "keep" else None,
        ),
        *(
            ["## Answers before and after\n", "Greedy decoding, with the base model and the adapter as trained.\n"]
            if samples
            else []
        ),
        *[_sample(item) for item in samples[:_PROMPT_LIMIT]],
        *_training(metrics, data, curve_file),
        *([] if run.takes_over else _data(data, sources)),
        *([_proof(proof, exports)] if proof is not None else []),
        "## Reproduce\n",
        _command(run, sources),
        "<details><summary>All settings that the model depends on</summary>\n",
        _table(("variable", "value"), _setting_rows(settings)),
        "</details>\n",
    ]
    return "\n".join(parts)


def _data(data: dict[str, Any], sources: dict[str, Any]) -> list[str]:
    tested = sources.get("FT_EVAL_DATASET_NAME")
    return [
        "## Data\n",
        _table(("", *[name for name in ("train", "eval") if name in data]), _data_rows(data)),
        *([f"Evaluated on {_link(tested, 'datasets/')}.\n"] if tested is not None else []),
        f"Chat template: {data['chat_template']}. Maximum row length: {data['max_length']} tokens{', packed' if data['packed'] else ''}. "
        "The whole report, with rows token by token, is in `data_report.html`.\n",
    ]


def _metadata(
    settings: Settings, sources: dict[str, Any], metrics: dict[str, Any], published: Published, title: str
) -> ModelCardData:
    model, datasets = sources["FT_MODEL_NAME"], [source for _, source in _trained_on(sources)]
    terms = model.get("card", {})
    languages = list(
        dict.fromkeys(word for source in (*datasets, model) for word in source.get("card", {}).get("language", ()))
    )
    loss = metrics["eval_loss_last"]
    tested = sources.get("FT_EVAL_DATASET_NAME")
    on = [tested] if tested is not None else datasets
    result = EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=on[0]["source"] if len(on) == 1 and on[0]["kind"] == "hub" else "private",
        dataset_name=", ".join(map(_short, on)) + ("" if tested is not None else ", rows held out"),
        metric_type="loss",
        metric_name="evaluation loss (nats per token)",
        metric_value=round(loss, 4) if loss is not None else 0,
    )
    on_hub = model["kind"] == "hub"
    return ModelCardData(
        library_name="transformers" if published.merged else "peft",
        pipeline_tag="text-generation",
        tags=["qlora" if settings.use_4bit else "lora", "peft", "trl", "sft"],
        base_model=model["source"] if on_hub else None,
        base_model_relation=("finetune" if published.merged else "adapter") if on_hub else None,
        datasets=[dataset["source"] for dataset in datasets if dataset["kind"] == "hub"] or None,
        license=terms.get("license"),
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
        language=languages or None,
        model_name=title if loss is not None else None,
        eval_results=[result] if loss is not None else None,
    )


def _what_it_is(settings: Settings, sources: dict[str, Any], published: Published) -> str:
    way = f"QLoRA (4-bit {settings.bnb_4bit_quant_type.upper()})" if settings.use_4bit else "LoRA"
    what, earlier = _link(sources["FT_MODEL_NAME"], ""), sources.get("FT_ADAPTER_NAME")
    if not _trained_on(sources):
        what += " with an adapter that was trained elsewhere" + (f", {_link(earlier, '')}" if earlier else "")
    else:
        what += f" fine-tuned on {_datasets(sources)} with {way}"
        what += f", going on from the adapter {_link(earlier, '')}" if earlier else ""
    if published.merged:
        what += ", then merged." + (" The adapter alone is in `adapter/`." if published.adapter else "")
    else:
        what += ". This is the adapter; it needs its base model."
    terms = sources["FT_MODEL_NAME"].get("card", {})
    if "license" in terms:
        named = terms.get("license_name") or terms["license"]
        what += f" The base model's license, {for_cell(named)}, holds for it too."
    return what + "\n"


def _trained_on(sources: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The datasets trained on: one, or those of a mixture in their order."""
    return [(name, source) for name, source in sources.items() if name.startswith("FT_DATASET_NAME")]


def _datasets(sources: dict[str, Any]) -> str:
    links = [_link(source, "datasets/") for _, source in _trained_on(sources)]
    return links[0] if len(links) == 1 else f"{', '.join(links[:-1])} and {links[-1]}"


def _short(source: dict[str, Any]) -> str:
    """A source's name for readers: a Hub id, or the last part of a path, which itself stays private."""
    name: str = source["source"]
    return name if source["kind"] == "hub" else name.rstrip("/").rsplit("/", 1)[-1]


def _link(source: dict[str, Any], prefix: str) -> str:
    if source["kind"] != "hub":
        return f"`{_short(source)}`"
    commit = f" at `{source['commit'][:12]}`" if source["commit"] else ""
    return f"[{source['source']}](https://huggingface.co/{prefix}{source['source']}){commit}"


def _usage(
    published: Published, base: dict[str, Any], rank: int | None, exports: list[dict[str, Any]], system: str | None
) -> str:
    """How to run it: in transformers, served by vLLM merged or as an adapter, and with Ollama if there is a GGUF.

    `system` is the system prompt that it was trained with.
    """
    name = published.name or "."
    at = f', revision="{published.revision}"' if published.revision else ""
    ahead = ""
    if system is not None:
        quoted = json.dumps(for_terminal(system), ensure_ascii=False).replace("`", "\\u0060")
        ahead = f'{{"role": "system", "content": {quoted}}}, '
    if published.merged:
        load = [
            "from transformers import pipeline",
            f'model = pipeline("text-generation", "{name}", device_map="auto"{at})',
            f'print(model([{ahead}{{"role": "user", "content": "Hello"}}], max_new_tokens=200)[0]["generated_text"][-1]["content"])',
        ]
    else:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}", device_map="auto"{at})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{at})',
        ]
    copy = "   # in a copy of this repository" if published.name else ""
    if published.merged:
        folder = f"./adapter{copy}"
    else:
        folder = f".{copy}'s branch {published.revision}" if published.revision else name
    shell = (
        [f"vllm serve {name}" + (f" --revision {published.revision}" if published.revision else "")]
        if published.merged
        else []
    )
    if published.adapter and rank is not None:
        shell.append(f"vllm serve {_short(base)} --enable-lora --max-lora-rank {rank} --lora-modules tuned={folder}")
    if any(one["format"] == "fp8" for one in exports):
        shell.append("vllm serve ./fp8   # in a copy of this repository")
    if any(one["file"].endswith(".gguf") for one in exports):
        shell.append("ollama create tuned -f Modelfile && ollama run tuned   # in a copy of this repository")
    text = "" if published.name else "In this folder:\n\n"
    if system is not None:
        text += "It was trained with a system prompt, and answers best with the same one.\n\n"
    text += "```python\n" + "\n".join(load) + "\n```\n"
    if shell:
        text += "\n```sh\n" + "\n".join(shell) + "\n```\n"
    if published.merged and published.adapter:
        branch = f"{published.revision}-adapter" if published.revision else "adapter"
        place = f'"{published.name}", revision="{branch}"' if published.name else '"adapter"'
        text += f"\nThe adapter in Python, on its base: `AutoPeftModelForCausalLM.from_pretrained({place})`.\n"
    return text


def _rank_to_serve(adapter: dict[str, Any]) -> int | None:
    """What vLLM must be told: it takes these ranks, and its default is 16. None for an adapter that it cannot serve."""
    if adapter.get("use_dora") or adapter.get("modules_to_save") or adapter.get("trainable_token_indices"):
        return None
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _training(metrics: dict[str, Any], data: dict[str, Any], curve_file: str) -> list[str]:
    if not metrics["steps"]:
        return ["## Training\n", "The adapter was trained elsewhere; here it was merged and published.\n"]
    return ["## Training\n", f"![Loss curve]({curve_file})\n", _table(("", ""), _training_rows(metrics, data))]


def _training_rows(metrics: dict[str, Any], data: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("optimizer steps", f"{metrics['steps']:,}"),
        ("epochs", f"{metrics['epochs']:.3g}"),
        ("tokens seen", f"{round(metrics['epochs'] * data['train']['tokens']):,}"),
        (
            "training loss, first → last logged",
            f"{_number(metrics['loss_first'])} → {_number(metrics['loss_last'])} nats per token",
        ),
    ]
    if metrics["eval_loss_last"] is not None:
        rows.append(
            (
                "evaluation loss, before → after",
                f"{_number(metrics['eval_loss_first'])} → {_number(metrics['eval_loss_last'])} nats per token",
            )
        )
    rows.append(("device", f"{metrics['processes']} × {metrics['device']}"))
    if metrics["peak_memory_bytes"]:
        rows.append(("peak GPU memory", f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB"))
    if metrics["peak_memory_bytes"] and (goodput := metrics.get("goodput")):  # earlier versions did not record it
        if (speed := speed_text(goodput)) is not None:
            rows.append(("speed", speed))
        rows.append(("time spent in the last start", time_text(goodput)))
    return rows


def _data_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    parts = [data[name] for name in ("train", "eval") if name in data]
    labels = {
        "format": "row format", "rows": "rows", "tokens": "tokens", "learned_tokens": "learned tokens",
        "trained_on": "what is learned", "truncated_rows": "truncated rows", "malformed_rows": "malformed rows, left out", "unlearnable_rows": "rows with nothing to learn, left out",
    }  # fmt: skip
    return [
        (label, *[f"{part[key]:,}" if isinstance(part[key], int) else str(part[key]) for part in parts])
        for key, label in labels.items()
    ]


def _proof(proof: dict[str, Any], exports: list[dict[str, Any]]) -> str:
    base = (
        "the dequantized weights that it was trained on" if proof["merged_into"] == "quantized" else "the original base"
    )
    rows = [
        (
            "merged model", proof["dtype"], f"{proof['mean_kl_nats']:.2g} (at most {proof['max_kl_nats']:.2g})",
            f"{proof['same_first_choice']:.1%}", f"{proof['same_answers']} of {proof['answers']}",
        ),
        *(
            (
                f"`{one['file']}`", one["format"], f"{one['mean_kl_nats']:.2g} (at most {one['max_kl_nats']:.2g})",
                f"{one['same_first_choice']:.1%}", f"{one['same_answers']} of {one['answers']}",
            )
            for one in exports
        ),
    ]  # fmt: skip
    text = (
        "## Proof\n\n"
        f"The adapter was merged into {base}. The merged model was read back from disk and compared with the trained one on {proof['tokens']} tokens of {proof['rows']} rows"
        + (", and each export with the merged model on the answers to the prompts" if exports else "")
        + f". {proof['values_off']:,} of its values differ by more than rounding.\n\n"
        + _table(("", "format", "KL divergence, nats per token", "same first choice", "same greedy answers"), rows)
    )
    if proof["loss_base"] is not None:
        losses = " → ".join(_number(proof[name]) for name in ("loss_base", "loss_trained", "loss_merged"))
        text += f"\nLoss on these rows, base → trained → merged: {losses} nats per token.\n"
    return text


def _command(run: Run, sources: dict[str, Any]) -> str:
    """One command of the same image that makes the same model, with names instead of this machine's paths."""
    settings = run.settings
    values = settings.affecting("merge")
    chosen = {
        variable(name): value_text(values[name]) for name in values if value_text(values[name]) != default_text(name)
    }
    model = sources["FT_MODEL_NAME"]
    chosen["FT_MODEL_NAME"] = f"{_short(model)}@{model['commit']}" if model["commit"] else _short(model)
    chosen["FT_DATASET_NAME"] = ",".join(public_name(part.name) for part in dataset_parts(settings))
    if run.takes_over:
        chosen["FT_STAGES"] = value_text(settings.stages)
    for name in ("FT_EVAL_DATASET_NAME", "FT_ADAPTER_NAME", "FT_CHAT_TEMPLATE"):
        if name in chosen:
            chosen[name] = public_name(chosen[name])
    arguments = [f"  -e {name}={shlex.quote(for_terminal(value))}" for name, value in sorted(chosen.items())]
    lines = [
        f"docker run --gpus all -v finetune:/results -e FT_OUTPUT_DIR=/results {' '.join(['-e HF_TOKEN'])}",
        *arguments,
        f"  finetune-job:{__version__}",
    ]
    return "```sh\n" + " \\\n".join(lines) + "\n```\n"


def _setting_rows(settings: Settings) -> list[tuple[str, str]]:
    """The settings that the model depends on, without those for where it was computed and stored."""
    values = settings.affecting("merge")
    names = [name for name in values if not name.endswith("_name")]
    texts = {name: value_text(values[name]) for name in names}
    texts |= {name: public_name(texts[name]) for name in ("chat_template",) if texts[name]}
    return [
        (f"`{variable(name)}`", _code(text) + (" (default)" if text == default_text(name) else ""))
        for name, text in texts.items()
    ]


def _code(text: str) -> str:
    """A value for a table cell, as code if Markdown can show it so."""
    return _one_line(text) if re.search(r"[`\n\r]", text) else f"`{for_terminal(text)}`".replace("|", r"\|")


def _sample(item: dict[str, str]) -> str:
    return f"**{_one_line(item['prompt'])}**\n\n" + _table(
        ("before", "after"), [(_one_line(item["base"]), _one_line(item["tuned"]))]
    )


def _one_line(text: str) -> str:
    """Escape any text for a table cell."""
    return "<br>".join(for_cell(line) for line in for_terminal(text).strip().splitlines() if line.strip())


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
