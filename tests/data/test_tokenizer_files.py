"""A published tokenizer is the base's own, readable by other programs, and encodes as in the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from job.data.templates import load_tokenizer, set_chat_template
from job.data.tokenizer_files import publish_tokenizer


def trained(base: Path, folder: Path, template: str) -> Path:
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, template)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_bases_own_files_are_published_byte_for_byte_where_they_encode_right(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {
        **config,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ messages[0].content }}",
        "add_bos_token": True,
    }
    (base / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    publish_tokenizer(base, trained(base, tmp_path / "trained", "auto"), tmp_path / "published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "published" / name).read_bytes() == (base / name).read_bytes()


def test_the_chosen_chat_template_is_published_and_no_class_of_one_version_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    publish_tokenizer(tiny_model, trained(tiny_model, tmp_path / "trained", "chatml"), tmp_path / "published")
    config = json.loads((tmp_path / "published" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "<|im_start|>" in config["chat_template"]
    assert not {"is_local", "local_files_only"} & config.keys()
    found = AutoTokenizer.from_pretrained(tmp_path / "published")
    assert "<|im_start|>" in found.chat_template


def test_a_base_that_transformers_5_saved_gets_the_class_that_older_versions_know(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {
        "tokenizer_class": "TokenizersBackend",
        "is_local": True,
        "local_files_only": True,
        "backend": "tokenizers",
    }
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    publish_tokenizer(base, trained(base, tmp_path / "trained", "auto"), tmp_path / "published")
    found = json.loads((tmp_path / "published" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & found.keys()


def test_llama_2s_tokenizer_encodes_as_trained_in_every_form_that_it_comes_in(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "models" / "stories15M"
    for form in ("whole", "legacy off", "model only"):
        base = tmp_path / form
        base.mkdir()
        for file in source.glob("*token*"):
            data = file.read_bytes()
            if form == "legacy off" and file.name == "tokenizer_config.json":
                data = data.replace(b'"legacy": true', b'"legacy": false')
            if not (form == "model only" and file.name == "tokenizer.json"):
                (base / file.name).write_bytes(data)
        target = tmp_path / f"{form}-published"
        publish_tokenizer(base, trained(base, tmp_path / f"{form}-trained", "llama-2"), target)
        assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
        config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["tokenizer_class"] in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast")
        found = AutoTokenizer.from_pretrained(target)
        assert found.encode("<s>[INST] Hi [/INST]", add_special_tokens=False)[:3] == [1, 518, 25580], form
        code = "def f(x):\n    if x:\n        return 1"
        assert found.encode(code) == load_tokenizer(base).encode(code), form
