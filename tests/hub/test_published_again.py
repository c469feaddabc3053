"""Publishing again takes away what this run published and no longer does, and nothing that people have added or changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from job.errors import PermissionRefused, SettingsError, TransientError
from job.hub import to_folder
from job.hub.cards import terms
from job.hub.ownership import RECORD, list_files
from job.hub.publish import destinations_of, still_there
from job.storage import open_store
from tests.conftest import ROOT
from tests.fake_hub import Fault
from tests.hub.test_publish import on_the_hub, weights

__all__ = ["on_the_hub"]

CARD = "---\nlibrary_name: transformers\nlicense: other\ntags:\n- qlora\n---\n\n# A model\n"


def laid_out(folder: Path, run_id: str, *, merged: bool = True, adapter: bool = True, text: str = "weights") -> Path:
    """A repository as the stage lays it out: the adapter lies at the top if there is nothing else."""
    inner = folder / "adapter" if merged else folder
    inner.mkdir(parents=True)
    if merged:
        (folder / "model.safetensors").write_text(text, encoding="utf-8")
        (folder / "config.json").write_text("{}", encoding="utf-8")
    if adapter:
        (inner / "adapter_model.safetensors").write_text(text, encoding="utf-8")
        (inner / "adapter_config.json").write_text("{}", encoding="utf-8")
    else:
        inner.rmdir()
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / RECORD).write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
    list_files(folder)
    return folder


class Place:
    """A folder, a prefix of a bucket or a repository, as people see it."""

    def __init__(
        self, destination: Any, read: Callable[[], dict[str, bytes]], add: Callable[[str, bytes], None]
    ) -> None:
        self.destination, self.read, self.add = destination, read, add

    @property
    def names(self) -> set[str]:
        return set(self.read()) - {"MANIFEST.json", ".gitattributes"}


@pytest.fixture(params=["folder", "bucket", "hub"])
def place(request: pytest.FixtureRequest, make_run: Callable[..., Any], tmp_path: Path) -> Iterator[Place]:
    if request.param == "folder":
        folder = tmp_path / "out" / "model"
        (destination,) = destinations_of(make_run(PUBLISH_TO=str(folder)))

        def read() -> dict[str, bytes]:
            return {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }

        def add(name: str, content: bytes) -> None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

        yield Place(destination, read, add)
    elif request.param == "bucket":
        request.getfixturevalue("s3_environment")
        url = f"s3://bucket/{tmp_path.name}/model"
        (destination,) = destinations_of(make_run(PUBLISH_TO=url))
        store = open_store(url)
        yield Place(destination, lambda: {key: store.get(key) for key, _ in store.list("")}, store.put)
    else:
        hub, _, destination = request.getfixturevalue("on_the_hub")
        name = "models/me/tuned"
        yield Place(
            destination,
            lambda: hub.files(name),
            lambda file, content: hub.add(name, {**hub.files(name), file: content}) and None,
        )


ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
MERGED = {"model.safetensors", "config.json"}
BOTH = {*MERGED, *(f"adapter/{name}" for name in ADAPTER)}


def test_what_is_no_longer_published_goes_so_that_no_reader_takes_one_thing_for_another(
    place: Place, tmp_path: Path
) -> None:
    """An `adapter_config.json` that is left at the top makes every loader look for the adapter there."""
    kinds = [({"merged": False}, ADAPTER), ({}, BOTH), ({"adapter": False}, MERGED), ({"merged": False}, ADAPTER)]
    for number, (kind, files) in enumerate(kinds):
        place.destination.publish(laid_out(tmp_path / str(number), "here", **kind))
        assert place.names == {*files, "README.md", RECORD}, kind


def test_what_people_have_added_or_changed_stays(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.destination.publish(laid_out(tmp_path / "first", "here"))
    place.add("awq/model.safetensors", b"theirs")
    place.add("v2/finetune_run.json", b'{"run_id": "another"}')  # another run's model, in a place below
    place.add("README.md", b"# My words")
    place.destination.publish(laid_out(tmp_path / "second", "here", adapter=False, text="new"))
    found = place.read()
    assert place.names == {*MERGED, "README.md", RECORD, "awq/model.safetensors", "v2/finetune_run.json"}
    assert (found["README.md"], found["awq/model.safetensors"]) == (b"# My words", b"theirs")
    assert found["model.safetensors"] == b"new"
    assert "README.md" in capsys.readouterr().out
    place.destination.publish(laid_out(tmp_path / "third", "here", adapter=False, text="newer"))
    assert place.read()["README.md"] == b"# My words"


def test_a_card_that_nobody_changed_is_replaced(place: Place, tmp_path: Path) -> None:
    place.destination.publish(laid_out(tmp_path / "first", "here"))
    second = laid_out(tmp_path / "second", "here")
    (second / "README.md").write_text(CARD + "New.\n", encoding="utf-8")
    list_files(second)
    place.destination.publish(second)
    assert place.read()["README.md"].endswith(b"New.\n")


def test_a_kill_between_two_files_leaves_none_that_the_next_start_takes_for_others(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.destination.publish(laid_out(tmp_path / "first", "here"))
    second = laid_out(tmp_path / "second", "here", text="new")
    for name in ("README.md", "config.json", "adapter/adapter_config.json"):
        (second / name).write_text((second / name).read_text(encoding="utf-8") + " ", encoding="utf-8")
    list_files(second)
    shutil.copytree(second, tmp_path / "again")
    left = [2]

    def dies(act: Any) -> Any:
        def acting(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "as if killed")
            return act(*arguments, **named)

        return acting

    with monkeypatch.context() as patch:
        if isinstance(place.destination, to_folder.Folder):
            patch.setattr(to_folder, "is_fixed", lambda folder: True)
            patch.setattr(os, "replace", dies(os.replace))
        elif hasattr(place.destination, "_store"):
            patch.setattr(type(place.destination._store), "upload", dies(type(place.destination._store).upload))
        else:  # one commit changes everything at once
            patch.setattr(type(place.destination), "_commit", dies(lambda *_: None))
            left[0] = 0
        with pytest.raises(OSError, match="as if killed"):
            place.destination.publish(second)
    place.destination.publish(tmp_path / "again")
    found = place.read()
    assert all(found[name].endswith(b" ") for name in ("README.md", "config.json", "adapter/adapter_config.json"))


def test_weights_of_others_stay_where_an_older_version_listed_no_files(place: Place, tmp_path: Path) -> None:
    old = laid_out(tmp_path / "first", "here")
    (old / RECORD).write_text('{"run_id": "here"}', encoding="utf-8")
    place.destination.publish(old)
    place.add("v2/model.safetensors", b"another run's")
    place.add("mine.gguf", b"mine")
    place.destination.publish(laid_out(tmp_path / "second", "here", merged=False))
    assert {"v2/model.safetensors", "mine.gguf"} <= place.names
    assert "model.safetensors" not in place.names
    assert not any(name.startswith("adapter/") for name in place.names)


def test_a_note_that_somebody_removes_again_is_no_reason_to_publish_again(place: Place, tmp_path: Path) -> None:
    place.destination.publish(laid_out(tmp_path / "first", "here"))
    place.add("notes.txt", b"theirs")
    record = place.destination.publish(laid_out(tmp_path / "second", "here", text="new"))
    assert "notes.txt" not in record.get("sizes", {})


def test_what_another_job_publishes_below_the_folder_meanwhile_stays(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    (destination,) = destinations_of(make_run(PUBLISH_TO=str(target)))
    destination.publish(laid_out(tmp_path / "first", "here"))
    (target / "inbox").mkdir()
    swap = to_folder._swap

    def then_another_publishes(new: Path, into: Path) -> bool:
        monkeypatch.setattr(to_folder, "_swap", swap)
        to_folder.publish_folder(laid_out(tmp_path / "theirs", "another"), target / "other")
        return swap(new, into)

    monkeypatch.setattr(to_folder, "_swap", then_another_publishes)
    destination.publish(laid_out(tmp_path / "second", "here", text="new"))
    assert weights(target) == "new"
    assert weights(target / "other") == "weights"
    assert (target / "inbox").is_dir()


def test_a_file_of_somebody_else_where_one_must_be_written_is_named(place: Place, tmp_path: Path) -> None:
    place.destination.publish(laid_out(tmp_path / "first", "here", merged=False))
    place.add("config.json", b"theirs")
    with pytest.raises(SettingsError, match=r"contains config\.json, which this job did not write"):
        place.destination.publish(laid_out(tmp_path / "second", "here"))
    assert place.read()["config.json"] == b"theirs"


def test_an_edited_text_is_no_reason_to_publish_again_and_a_truncated_model_is(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run(PUBLISH_TO=str(tmp_path / "model"))
    (destination,) = destinations_of(run)
    record = {"destination": str(destination), "places": [destination.publish(laid_out(tmp_path / "new", run.id))]}
    (tmp_path / "model" / "README.md").write_text("# My words", encoding="utf-8")
    (tmp_path / "model" / "eval.txt").write_text("mine", encoding="utf-8")
    assert still_there(run, record)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert not still_there(run, record)


# -- folders that cannot be renamed ------------------------------------------------------------------------------------


_MOUNTED = """
    set -e
    mount -t tmpfs none "$1/volume"
    mkdir "$1/volume/lost+found" "$1/same" "$1/behind"
    mount --bind "$1/behind" "$1/same"
    exec "$2" -c "$3" "$1"
"""
_PUBLISHES = """
import os, sys
from pathlib import Path
from job.environment import load_settings
from job.hub.publish import destinations_of
from job.run import Run
from tests.hub.test_published_again import laid_out
top = Path(sys.argv[1])
for name in ("volume", "same"):
    os.environ["FT_PUBLISH_TO"] = str(top / name)
    (destination,) = destinations_of(Run.of(load_settings()))
    destination.check()
    for number, kind in enumerate(({"merged": False}, {}, {"adapter": False})):
        destination.publish(laid_out(top / f"{name}-{number}", "here", text=str(number), **kind))
        readable = {path.stat().st_mode & 0o777 for path in (top / name).rglob("*") if path.is_dir() and path.name == "adapter"}
        assert readable <= {0o755}, readable
    print(name, sorted(os.listdir(top / name)), (top / name / "model.safetensors").read_text())
print(sorted(os.listdir(top)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_volume_that_is_mounted_at_the_place_is_published_into(make_run: Callable[..., Any], tmp_path: Path) -> None:
    """As with `docker run -v $PWD/out:/out -e FT_PUBLISH_TO=/out`, and with a volume of a pod."""
    make_run()
    (tmp_path / "volume").mkdir()
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f"umask 027{_MOUNTED}", "bash", tmp_path, sys.executable, _PUBLISHES],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted({*MERGED, "README.md", RECORD})
    told = done.stdout.splitlines()
    assert told[:2] == [f"volume {sorted([*files, 'lost+found'])} 2", f"same {files} 2"]
    assert not [name for name in eval(told[-1]) if "partial" in name or "former" in name]


def test_a_folder_whose_parent_is_not_writable_is_published_into(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "shared" / "mine"
    target.mkdir(parents=True)
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target.parent and may(path, mode))
    (destination,) = destinations_of(make_run(PUBLISH_TO=str(target)))
    for text in ("first", "second"):
        destination.check()
        destination.publish(laid_out(tmp_path / text, "here", text=text))
        assert weights(target) == text
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    assert not list(target.glob(".partial-*"))


def test_a_kill_halfway_into_a_volume_leaves_a_place_that_the_next_start_may_use(
    make_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "volume"
    target.mkdir()
    monkeypatch.setattr(to_folder, "is_fixed", lambda folder: True)
    (destination,) = destinations_of(make_run(PUBLISH_TO=str(target)))
    replace, left = os.replace, [3]  # the record as it is written, and two files

    def dies(source: Any, to: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "as if killed")
        replace(source, to)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="as if killed"):
        destination.publish(laid_out(tmp_path / "first", "here", text="first"))
    assert (target / RECORD).is_file()
    monkeypatch.setattr(os, "replace", replace)
    destination.check()
    destination.publish(laid_out(tmp_path / "second", "here", text="second"))
    assert weights(target) == "second"
    assert not list(target.glob(".partial-*"))


# -- what the Hub refuses ----------------------------------------------------------------------------------------------


def test_a_folder_that_a_console_made_is_an_empty_place(
    make_run: Callable[..., Any], tmp_path: Path, s3_environment: None
) -> None:
    prefix = f"{tmp_path.name}/mine"
    open_store("s3://bucket").client.put_object(Bucket="bucket", Key=f"{prefix}/", Body=b"")
    (destination,) = destinations_of(make_run(PUBLISH_TO=f"s3://bucket/{prefix}"))
    destination.check()
    destination.publish(laid_out(tmp_path / "new", "here"))


@pytest.mark.parametrize(
    ("status", "said", "error", "wanted"),
    [
        (400, "Your push was rejected because of X", SettingsError, "rejected because of X"),
        (403, "Private repository storage limit reached", PermissionRefused, "storage limit reached"),
        (422, "unprocessable", SettingsError, "unprocessable"), (409, "conflict", TransientError, "409"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_in_the_hubs_words_and_is_no_reason_to_start_again(
    on_the_hub: Any, tmp_path: Path, status: int, said: str, error: type[Exception], wanted: str
) -> None:
    hub, run, destination = on_the_hub
    hub.fault = lambda _, path: Fault(status=status, said=said) if "/commit/" in path else None
    with pytest.raises(error, match=wanted) as caught:
        destination.publish(laid_out(tmp_path / "new", run.id))
    if status == 403:
        assert "FT_HUB_PRIVATE" in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("status", "url", "error"),
    [
        (400, "https://bucket.s3.amazonaws.com/part", TransientError), (423, "https://huggingface.co/api/x", TransientError),
        (404, "https://huggingface.co/api/x", TransientError), (413, "https://huggingface.co/api/x", SettingsError),
    ],
)  # fmt: skip
def test_only_what_the_hubs_own_interface_refuses_is_final(status: int, url: str, error: type[Exception]) -> None:
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    from job.hub import hub_errors

    response = httpx.Response(status, request=httpx.Request("PUT", url))
    with pytest.raises(error), hub_errors("x"):
        raise HfHubHTTPError("RequestTimeout", response=response)


def test_a_card_whose_metadata_the_hub_refuses_is_published_without_them(
    on_the_hub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, run, destination = on_the_hub
    hub.refused_card = "license: other"
    destination.publish(laid_out(tmp_path / "new", run.id))
    card = hub.files("models/me/tuned")["README.md"].decode()
    assert "license" not in card
    assert "library_name: transformers" in card
    assert card.endswith("\n# A model\n")
    assert "is not allowed The card is published without them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ({"license": "Apache-2.0", "language": "EN"}, {"license": "apache-2.0", "language": ["en"]}),
        ({"license": "Our-Own-1.0"}, {"license": "other", "license_name": "our-own-1.0"}),
        ({"license": "other", "license_name": "theirs"}, {"license": "other", "license_name": "theirs"}),
        ({"license": "llama3.1", "language": ["en-US", "en-GB", "pt-BR"]}, {"license": "llama3.1", "language": ["en", "pt"]}),
    ],
)  # fmt: skip
def test_terms_of_other_cards_are_written_as_the_hub_takes_them(card: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert terms(card) == wanted


def test_a_password_in_the_endpoint_is_in_no_record(
    on_the_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, destination = on_the_hub
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:s3cretpass@hub.example:8080/")
    record = destination.publish(laid_out(tmp_path / "new", run.id))
    assert record["page"] == "http://hub.example:8080/me/tuned"


@pytest.mark.parametrize("run_id", ["v1..2", "x.lock", "run."])
def test_a_run_id_that_git_allows_no_tag_of_is_refused_before_anything_is_paid_for(
    monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    from job.environment import load_settings

    monkeypatch.setenv("HF_TOKEN", "hf_test_token")
    monkeypatch.setenv("FT_RUN_ID", run_id)
    load_settings()  # without the Hub it is a name like any other
    for to in ("hf://me/m", f"hf://me/m@{run_id}"):
        monkeypatch.setenv("FT_PUBLISH_TO", to)
        with pytest.raises(SettingsError, match="git allows no"):
            load_settings()
