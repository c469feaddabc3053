"""Writes the tables of the docs that the code decides: settings, supported combinations, files. `make docs` runs it.

python docs/generate.py [--check]
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from job.environment import settings_table  # noqa: E402
from job.environment.contradictions import contradictions  # noqa: E402
from job.settings import Settings, variable  # noqa: E402
from job.training.plan.load import obstacle  # noqa: E402

FIRST = (
    "model_name", "dataset_name", "new_model", "publish_to", "store_url", "run_id", "max_seq_length", "packing", "lora_r",
    "learning_rate", "num_train_epochs", "eval_split",
)  # fmt: skip

# A config.json of each family, as far as the choice of layers depends on it.
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
_MODELS: dict[str, dict[str, Any]] = {
    "Llama 1 to 3.x, TinyLlama, SmolLM2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "Mistral, Qwen2, 2.5 and 3, Phi-3 and 4, SmolLM3, Gemma 3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
    },
    "their checkpoints in bitsandbytes' 4 bits": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    },
    "Gemma 2, other decoders": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
}
_WAYS: dict[str, dict[str, Any]] = {
    "QLoRA, 4-bit (default)": {},
    "LoRA, 16-bit base": {"use_4bit": False},
    "packing": {"packing": True},
    "FP8 products": {"frozen_precision": "fp8"},
    "FSDP2 (`FT_SHARDING=full`)": {"sharding": "full"},
    "FP8 with FSDP2": {"frozen_precision": "fp8", "sharding": "full"},
    "split over GPUs (`FT_DEVICE_MAP`)": {"device_map": "balanced"},
    "CPU": {"device": "cpu"},
}


def support_table() -> list[str]:
    """Which model can be trained in which way: fast, runs or refused."""
    rows = [("", *_MODELS)]
    rows += [(way, *(_verdict(named, config) for config in _MODELS.values())) for way, named in _WAYS.items()]
    return _table(rows)


def _verdict(named: dict[str, Any], config: dict[str, Any]) -> str:
    settings = Settings(**named)
    if contradictions(settings):
        return "refused"
    if settings.device == "cpu":
        return "runs"  # the fused layers are for GPUs; on a CPU they only serve tests
    reason = obstacle(settings, {**_COMMON, **config})
    if reason is None:
        return "**fast**"
    return "refused" if settings.frozen_precision == "fp8" else "runs"


def settings_tables() -> list[str]:
    """The twelve settings that matter first, then the others."""
    rows = {row["name"]: row for row in settings_table()}
    first = [variable(name) for name in FIRST]
    return [
        "## The twelve that matter", "", *_settings(rows[name] for name in first), "",
        "## All others", "", *_settings(row for name, row in rows.items() if name not in first),
    ]  # fmt: skip


def _settings(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = (f"| `{row['name']}` | {row['allowed']} | `{row['default']}` | {row['meaning']} |" for row in rows)
    return ["| variable | allowed | default | meaning |", "| --- | --- | --- | --- |", *lines]


def file_list() -> list[str]:
    """Every module and what it is for, by the first sentence of its docstring."""
    lines = ["```"]
    room = None
    for path in sorted(_modules(), key=lambda path: (len(path.parts) > 2, path.parent.as_posix(), path.name)):
        name = path.relative_to(ROOT).as_posix()
        if path.parent != room:
            room = path.parent
            lines += ["", f"{room.relative_to(ROOT).as_posix()}/"] if room != ROOT else []
        indent = "" if room == ROOT else "  "
        lines.append(f"{indent}{path.name if room != ROOT else name:<{24 - len(indent)}} {_purpose(path)}")
    return [*lines, "```"]


def _modules() -> Iterator[Path]:
    yield ROOT / "entrypoint.py"
    for path in (ROOT / "job").rglob("*.py"):
        if _purpose(path):
            yield path


def _purpose(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{' --- |' * len(rows[0])}", *body]


def pages() -> dict[Path, tuple[str, list[str]]]:
    """Each page, the marker in it, and what belongs between the marker's begin and end."""
    return {
        ROOT / "README.md": ("support", support_table()),
        ROOT / "docs" / "settings.md": ("settings", settings_tables()),
        ROOT / "docs" / "layout.md": ("files", file_list()),
    }


def generated(file: Path, marker: str, lines: list[str]) -> str:
    """The page with what the code says between its markers."""
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}" + "\n".join(lines) + f"\n{end}{rest.split(end)[1]}"


def main() -> int:
    stale = []
    for file, (marker, lines) in pages().items():
        wanted = generated(file, marker, lines)
        if wanted != file.read_text(encoding="utf-8"):
            stale.append(file.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                file.write_text(wanted, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"Run `make docs`: {', '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    for name in [name for name in os.environ if name.startswith("FT_")]:
        del os.environ[name]  # the tables are about the defaults
    sys.exit(main())
