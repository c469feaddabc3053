"""What is published holds no path, host, user or secret of the machine that made it, whatever the settings say."""

from __future__ import annotations

import getpass
import shutil
import socket
from pathlib import Path

from huggingface_hub import ModelCard

from tests.conftest import LIGHTHOUSE, Job


def test_no_byte_of_it_tells_where_it_was_made(job: Job, tmp_path: Path) -> None:
    """Every setting that takes a place is set to one whose name tells tales. The last part of a source's name may be told."""
    place = tmp_path / "telltale-place"
    shutil.copytree(job.environment["FT_MODEL_NAME"], place / "base-model")
    for name in ("rows.jsonl", "held-out.jsonl"):
        shutil.copy(LIGHTHOUSE, place / name)
    (place / "template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}",
        encoding="utf-8",
    )
    (place / "telltale.env").write_text("FT_LORA_ALPHA=8\n", encoding="utf-8")
    (place / "termination").write_text("", encoding="utf-8")
    target = tmp_path / "published"
    result = job.run(
        FT_MODEL_NAME=str(place / "base-model"), FT_DATASET_NAME=str(place / "rows.jsonl"), FT_EVAL_DATASET_NAME=str(place / "held-out.jsonl"),
        FT_EVAL_SPLIT="train[:8]", FT_CHAT_TEMPLATE=str(place / "template.jinja"), FT_OUTPUT_DIR=str(place / "telltale-output"),
        FT_STORE_URL=str(place / "telltale-store"), FT_ENV_FILE=str(place / "telltale.env"), FT_TERMINATION_LOG=str(place / "termination"),
        FT_CONTAINER="telltale.sif", FT_MASTER_ADDR="telltale-host", FT_PUBLISH_TO=str(target), FT_MAX_STEPS="2", FT_SYSTEM_PROMPT="Keep the |light| `on`.",
        HF_TOKEN="hf_telltale_token", AWS_SECRET_ACCESS_KEY="telltale_secret", MY_PASSWORD="telltale_password",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    files = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert len(files) > 8
    told = [b"telltale", str(tmp_path).encode(), str(Path.home()).encode() + b"/"]
    names = (socket.gethostname(), getpass.getuser())
    told += [name.encode() for name in names if len(name) > 6]  # a shorter one may be anywhere by chance
    for path, data in files.items():
        for word in told:
            assert word not in data, (path.name, word)
    everything = b"".join(files.values())
    assert b"base-model" in everything
    assert b"rows.jsonl" in everything
    card = (target / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.eval_results[0].dataset_name == "held-out.jsonl"
    assert "Evaluated on `held-out.jsonl`." in card
    assert r'model([{"role": "system", "content": "Keep the |light| \u0060on\u0060."}, {"role": "user"' in card
    row = next(line for line in card.splitlines() if line.startswith("| `FT_SYSTEM_PROMPT`"))
    assert row.replace(r"\|", "").count("|") == 3, row
    assert not {path.suffix for path in files} - {".safetensors", ".json", ".md", ".png", ".html", ".jinja"}


def test_everyone_may_read_it_and_the_card_is_what_the_hub_takes(job: Job, tmp_path: Path) -> None:
    result = job.run(FT_PUBLISH_TO=str(tmp_path / "published"), FT_MAX_STEPS="2")
    assert result.code == 0, result.stderr
    for path in (tmp_path / "published").rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, path
    card = ModelCard.load(tmp_path / "published" / "README.md")
    assert card.data.library_name == "transformers"
    (found,) = card.data.eval_results or ()
    assert found.metric_type == "loss"
    assert found.metric_value > 0
