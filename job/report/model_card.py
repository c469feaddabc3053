"""The model card: which model was trained on which data, how, and with what result."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from job.guard.escape import for_cell, for_terminal
from job.report.goodput import speed_text, time_text
from job.run import Run, read_json
from job.settings import Settings, default_text, value_text, variable

_PROMPT_LIMIT = 8


def write_model_card(run: Run, *, curve_file: str, published_name: str) -> str:
    """The README.md of the published model, as Markdown with the Hub's metadata at the top.

    `published_name` is what a reader passes to `from_pretrained`.
    """
    settings = run.settings
    metrics, data = read_json(run.paths.metrics_file), read_json(run.paths.data_report_file)
    sources, proof = read_json(run.paths.sources_file), read_json(run.paths.merge_proof_file)
    samples = read_json(run.paths.samples_file)
    parts = [
        f"---\n{_metadata(settings, sources).to_yaml()}\n---\n",
        f"# {settings.new_model_name.rsplit('/', 1)[-1]}\n",
        f"{_link(sources['FT_MODEL_NAME'], '')} fine-tuned on {_link(sources['FT_DATASET_NAME'], 'datasets/')} with "
        f"{'QLoRA (4-bit ' + settings.bnb_4bit_quant_type.upper() + ')' if settings.use_4bit else 'LoRA'}, then merged. "
        "The adapter alone is in `adapter/`.\n",
        _usage(published_name),
        "## Training\n",
        f"![Loss curve]({curve_file})\n",
        _table(("", ""), _training_rows(metrics)),
        "## Data\n",
        _table(("", *[name for name in ("train", "eval") if name in data]), _data_rows(data)),
        f"Chat template: {data['chat_template']}. Maximum row length: {data['max_length']} tokens{', packed' if data['packed'] else ''}.\n",
        "## Answers before and after\n",
        "Greedy decoding, with the base model and the adapter as trained.\n",
        *[_sample(item) for item in samples[:_PROMPT_LIMIT]],
        "## Merge verification\n",
        f"The merged weights were read back from disk and compared with the trained model on {proof['tokens']} tokens from {proof['rows']} rows: "
        f"mean KL divergence {proof['mean_kl_nats']:.2g} nats per token, top-1 agreement on {proof['same_first_choice']:.1%} of the tokens, "
        f"largest relative weight difference {proof['largest_weight_difference']:.2g}.\n",
        "## Settings\n",
        _table(("variable", "value"), _setting_rows(settings)),
    ]
    return "\n".join(parts)


def _metadata(settings: Settings, sources: dict[str, Any]) -> ModelCardData:
    model, dataset = sources["FT_MODEL_NAME"], sources["FT_DATASET_NAME"]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qlora" if settings.use_4bit else "lora", "peft", "trl", "sft"],
        base_model=model["source"] if model["kind"] == "hub" else None,
        datasets=[dataset["source"]] if dataset["kind"] == "hub" else None,
    )


def _link(source: dict[str, Any], prefix: str) -> str:
    if source["kind"] != "hub":
        return f"`{source['source'].rstrip('/').rsplit('/', 1)[-1]}`"  # a local path stays private
    commit = f" at `{source['commit'][:12]}`" if source["commit"] else ""
    return f"[{source['source']}](https://huggingface.co/{prefix}{source['source']}){commit}"


def _usage(name: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")\n'
        'messages = [{"role": "user", "content": "Hello"}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=200)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n'
        "```\n"
    )


def _training_rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("optimizer steps", f"{metrics['steps']:,}"),
        ("epochs", f"{metrics['epochs']:.3g}"),
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
        "truncated_rows": "truncated rows", "malformed_rows": "malformed rows, left out", "unlearnable_rows": "rows with nothing to learn, left out",
    }  # fmt: skip
    return [
        (label, *[f"{part[key]:,}" if isinstance(part[key], int) else str(part[key]) for part in parts])
        for key, label in labels.items()
    ]


def _setting_rows(settings: Settings) -> list[tuple[str, str]]:
    """The settings that the model depends on, without those for where it was computed and stored."""
    values = settings.affecting("merge")
    names = [name for name in values if not name.endswith("_name")]
    texts = {name: value_text(values[name]) for name in names}
    return [
        (f"`{variable(name)}`", f"`{text}`" + (" (default)" if text == default_text(name) else ""))
        for name, text in texts.items()
    ]


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
