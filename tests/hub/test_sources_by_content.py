"""Sources are judged by content: what S3 and the Hub list, not by size, and not by what a cache happens to hold."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputError, TransientError
from job.hub import patiently
from job.hub import sources as sources_module
from job.hub.sources import Source, fetch, look_up
from job.storage import open_store
from tests.conftest import LIGHTHOUSE, Job, finished, read_until
from tests.fake_hub import FakeHub


@pytest.fixture
def bucket(tmp_path: Path, s3_environment: None) -> tuple[Any, Source]:
    store = open_store(f"s3://bucket/{tmp_path.name}")
    store.put("rows.jsonl", b'{"text": "one"}\n')
    return store, Source.parse("FT_DATASET_NAME", "dataset", store.url)


def fetched(source: Source, folder: Path) -> dict[str, bytes]:
    fetch(source, look_up(source), folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repaired_object_of_the_same_size_is_fetched_again(bucket: tuple[Any, Source], tmp_path: Path) -> None:
    store, source = bucket
    folder = tmp_path / "run" / "download" / "dataset"
    assert fetched(source, folder) == {"rows.jsonl": b'{"text": "one"}\n'}
    store.put("rows.jsonl", b'{"text": "two"}\n')
    assert fetched(source, folder) == {"rows.jsonl": b'{"text": "two"}\n'}


def test_an_object_that_is_not_listed_any_longer_is_removed(bucket: tuple[Any, Source], tmp_path: Path) -> None:
    """A start killed in download, and the object renamed before the next one: it must not train on both."""
    store, source = bucket
    folder = tmp_path / "run" / "download" / "dataset"
    fetched(source, folder)
    store.put("other.jsonl", store.get("rows.jsonl"))
    store.delete("rows.jsonl")
    assert list(fetched(source, folder)) == ["other.jsonl"]


def test_a_file_that_nothing_vouches_for_is_fetched_again_whatever_its_size(
    bucket: tuple[Any, Source], tmp_path: Path
) -> None:
    """As a power cut leaves it: the right name, the right size, and zeros."""
    _, source = bucket
    folder = tmp_path / "run" / "download" / "dataset"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_bytes(bytes(16))
    assert fetched(source, folder) == {"rows.jsonl": b'{"text": "one"}\n'}


def test_what_was_fetched_of_the_same_version_is_used(
    bucket: tuple[Any, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = bucket
    folder = tmp_path / "run" / "download" / "dataset"
    fetched(source, folder)
    monkeypatch.setattr(type(store), "download", lambda *_: pytest.fail("fetched again"))
    assert fetched(source, folder) == {"rows.jsonl": b'{"text": "one"}\n'}


# -- the Hub's cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tiny_model: Path) -> Source:
    from huggingface_hub import HfApi, constants

    hub.add("models/base/tiny", tiny_model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    api = HfApi(endpoint=hub.url)
    monkeypatch.setattr(sources_module, "HfApi", lambda: api)
    download = sources_module.snapshot_download
    monkeypatch.setattr(
        sources_module,
        "snapshot_download",
        lambda *names, **named: download(*names, endpoint=hub.url, cache_dir=tmp_path / "cache", **named),
    )
    return Source.parse("FT_MODEL_NAME", "model", "base/tiny")


@pytest.mark.parametrize("damage", ["emptied", "zeros of the right size"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_copy_in_the_cache_is_fetched_again(
    hub_source: Source, tmp_path: Path, tiny_model: Path, damage: str, name: str
) -> None:
    folder = tmp_path / "model"
    fetch(hub_source, look_up(hub_source), folder)
    blob = (folder / name).resolve()
    blob.write_bytes(b"" if damage == "emptied" else bytes(blob.stat().st_size))
    fetch(hub_source, look_up(hub_source), folder)
    assert (folder / name).read_bytes() == (tiny_model / name).read_bytes()


def test_a_large_damaged_file_is_noticed_when_it_is_hashed_and_removed_from_the_cache(
    hub_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., Any]
) -> None:
    from job.checkpoints.manifest import Manifest
    from job.hub.sources import listed_sha256
    from job.run import write_json
    from job.supervision.ledger import Ledger

    monkeypatch.setattr(sources_module, "_HASHED_AT_ONCE", 1000)
    run = make_run()
    listing = look_up(hub_source)
    fetch(hub_source, listing, run.paths.model_dir)
    write_json(run.paths.sources_file, {"FT_MODEL_NAME": {"sha256": listed_sha256(listing, run.paths.model_dir)}})
    blob = (run.paths.model_dir / "model.safetensors").resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(TransientError, match="differs from what the Hub lists"):
        Ledger(run)._refuse_damaged(Manifest.of(run.paths.stage_dir("download"), "f"))
    assert not blob.exists()


def test_a_hub_that_asks_for_patience_is_asked_again(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> None:
    from huggingface_hub import HfApi

    waits: list[float] = []
    answers = iter([429, 503, None])

    def ask() -> str:
        hub.refuse = next(answers)
        return str(HfApi(endpoint=hub.url).model_info("me/model").id)

    hub.add("models/me/model", {"config.json": b"{}"})
    monkeypatch.setattr("job.hub.time.sleep", waits.append)
    assert patiently(ask) == "me/model"
    assert len(waits) == 2


# -- what a run remembers of its sources -----------------------------------------------------------------------------


def test_a_run_whose_files_are_all_here_resumes_without_the_hub(job: Job, hub: FakeHub, tiny_model: Path) -> None:
    hub.add("models/base/tiny", tiny_model)
    hub.add("datasets/data/lighthouse", {"train.jsonl": LIGHTHOUSE.read_bytes()})
    job.environment |= {
        "FT_MODEL_NAME": "base/tiny", "FT_DATASET_NAME": "data/lighthouse", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "FT_STAGES": "train", "FT_MAX_STEPS": "200", "FT_LOG_LEVEL": "debug",
    }  # fmt: skip
    process = job.start()
    read_until(process, committed=True)
    process.send_signal(signal.SIGTERM)
    assert finished(process, *process.communicate(timeout=60)).code == 75
    hub.refuse = 429
    again = job.run()
    assert again.code == 0, again.stderr


def test_a_repaired_dataset_is_taken_after_a_65_if_nothing_was_trained(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": 1}\n{"text": 2}\n', encoding="utf-8")
    job.environment |= {
        "FT_DATASET_NAME": str(file),
        "FT_DATASET_SPLIT": "train",
        "FT_EVAL_SPLIT": "",
        "FT_STAGES": "train",
    }
    assert job.run().code == 65
    file.write_text('{"text": "one"}\n' * 20, encoding="utf-8")
    repaired = job.run()
    assert repaired.code == 0, repaired.stderr


def test_the_same_model_at_another_path_is_the_same_and_another_one_is_refused(
    job: Job, tmp_path: Path, tiny_model: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_model, here)
    assert job.run(FT_STAGES="train", FT_MODEL_NAME=str(here)).code == 0
    here.rename(there)
    moved = job.run(FT_STAGES="train,sample", FT_MODEL_NAME=str(there))
    assert moved.code == 0, moved.stderr
    assert moved.ended["train"] == "skipped"
    third = tmp_path / "third"
    shutil.copytree(there, third)
    config = third / "config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"eos_token_id": 2', '"eos_token_id": 1'), encoding="utf-8"
    )
    other = job.run(FT_STAGES="train,sample", FT_MODEL_NAME=str(third))
    assert other.code == 78, other.stderr
    assert "FT_MODEL_NAME" in other.error["message"]


def test_another_text_in_the_chat_templates_file_is_refused_once_something_was_trained(
    job: Job, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    text = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template.write_text(text, encoding="utf-8")
    job.environment |= {"FT_CHAT_TEMPLATE": str(template), "FT_STAGES": "prepare"}
    assert job.run().code == 0
    template.write_text(text.replace(": ", " says "), encoding="utf-8")
    again = job.run(FT_STAGES="train")
    assert again.code == 0, again.stderr
    assert again.ended["prepare"] == "done"
    template.write_text(text, encoding="utf-8")
    refused = job.run(FT_STAGES="train,sample")
    assert refused.code == 78, refused.stderr
    assert "FT_CHAT_TEMPLATE" in refused.error["message"]


def test_the_advice_to_set_the_number_of_processes_works(job: Job) -> None:
    """A checkpoint of one process resumes with FT_NPROC_PER_NODE=1, which the first start did not set."""
    job.environment |= {"FT_STAGES": "train", "FT_MAX_STEPS": "200", "FT_LOG_LEVEL": "debug"}
    del job.environment["FT_RUN_ID"]
    process = job.start()
    read_until(process, committed=True)
    process.send_signal(signal.SIGTERM)
    assert finished(process, *process.communicate(timeout=60)).code == 75
    again = job.run(FT_NPROC_PER_NODE="1")
    assert again.code == 0, again.stderr
    assert any(event.get("message", "").startswith("Resuming from") for event in again.events)


@pytest.mark.parametrize("name", [b"r\xffws.jsonl", b"sub\xfe/rows.jsonl"])
def test_a_file_whose_name_is_not_utf8_is_65_and_named(tmp_path: Path, name: bytes) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/" + name))
    file.parent.mkdir(parents=True)
    file.write_text('{"text": "one"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="is not UTF-8") as caught:
        look_up(Source.parse("FT_DATASET_NAME", "dataset", str(tmp_path / "data")))
    caught.value.message.encode("utf-8")


def test_a_dataset_with_partial_in_its_name_is_a_dataset_like_any_other(job: Job, tmp_path: Path) -> None:
    file = tmp_path / "rows.partial-2.jsonl"
    file.write_bytes(LIGHTHOUSE.read_bytes())
    result = job.run(FT_DATASET_NAME=str(file), FT_STAGES="prepare")
    assert result.code == 0, result.stderr
    manifest = Path(job.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run" / "download" / "MANIFEST.json"
    assert "dataset/rows.partial-2.jsonl" in manifest.read_text(encoding="utf-8")
