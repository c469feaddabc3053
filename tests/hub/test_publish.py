"""Publishing replaces this run's own model in one step, and never anybody else's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from job.errors import PermissionRefused, SettingsError, TransientError
from job.hub import to_folder
from job.hub.ownership import RECORD
from job.hub.publish import destinations_of, still_there
from job.hub.to_folder import publish_folder, restore_interrupted
from job.storage import open_store
from tests.conftest import ROOT, Job
from tests.fake_hub import FakeHub, Fault


def model(folder: Path, run_id: str, text: str = "weights") -> Path:
    """A laid-out repository of a run."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text, encoding="utf-8")
    (folder / RECORD).write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
    return folder


def weights(folder: Path) -> str:
    return (folder / "model.safetensors").read_text(encoding="utf-8")


# -- a folder ------------------------------------------------------------------------------------------------------


def test_a_run_replaces_its_own_model_and_leaves_nothing_beside_it(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model"
    run = make_run(PUBLISH_TO=str(target))
    for text in ("first", "second"):
        (destination,) = destinations_of(run)
        destination.check()
        record = destination.publish(model(tmp_path / text, run.id, text))
        assert weights(target) == text
        assert destination.holds(record)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("whose", ["another run", "a person"])
def test_a_folder_of_others_is_refused_before_the_training_and_after_it(
    make_run: Callable[..., Any], tmp_path: Path, whose: str
) -> None:
    target = model(tmp_path / "model", "other-run", "theirs")
    if whose == "a person":
        (target / RECORD).unlink()
    run = make_run(PUBLISH_TO=str(target))
    (destination,) = destinations_of(run)
    for act in (destination.check, lambda: destination.publish(model(tmp_path / "new", run.id))):
        with pytest.raises(SettingsError, match="other-run" if whose == "another run" else "did not write"):
            act()
    assert weights(target) == "theirs"


def test_two_runs_with_the_default_name_do_not_replace_each_other(make_run: Callable[..., Any], tmp_path: Path) -> None:
    for run_id in ("one", "two", "two"):
        run = make_run(RUN_ID=run_id, NEW_MODEL="tuned")
        (destination,) = destinations_of(run)
        destination.check()
        destination.publish(model(tmp_path / "new", run_id, run_id))
    published = tmp_path / "results" / "published"
    assert weights(published / "tuned") == "one"
    assert weights(published / "tuned-two") == "two"


def test_three_hundred_publications_at_once_all_succeed_and_the_result_is_one_of_them(tmp_path: Path) -> None:
    target, failures = tmp_path / "model", []
    sources = [model(tmp_path / f"source-{number}", "run", str(number)) for number in range(300)]

    def publish(batch: list[Path]) -> None:
        for source in batch:
            try:
                publish_folder(source, target)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=publish, args=(sources[start::12],)) for start in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert weights(target) in {str(number) for number in range(300)}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_finds_a_model_at_every_moment(tmp_path: Path) -> None:
    """Also without RENAME_EXCHANGE there is one old or new model after a kill; with it, at every moment."""
    target, over, missing = tmp_path / "model", threading.Event(), []
    publish_folder(model(tmp_path / "first", "run"), target)

    def look() -> None:
        while not over.is_set():
            try:
                weights(target)
            except FileNotFoundError:
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(200):
        publish_folder(model(tmp_path / "next", "run", str(number)), target)
    over.set()
    reader.join()
    assert missing == []


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    from job.hub import to_folder
    if {fallback}:
        def cannot(*_):
            raise OSError(22, "no such rename here")
        to_folder._rename = cannot
    left = int(sys.argv[3])
    def hook(event, arguments):
        global left
        if event in ("os.rename", "shutil.rmtree", "shutil.move", "os.chmod"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    to_folder.publish_folder(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("fallback", [False, True], ids=["one rename", "a file system without exchange"])
def test_a_kill_between_any_two_renames_leaves_the_old_model_or_the_new_one(tmp_path: Path, fallback: bool) -> None:
    target, ends = tmp_path / "out" / "model", set()
    code = textwrap.dedent(_KILLED.format(fallback=fallback))
    for moment in range(12):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        model(target, "run", "old")
        new = model(tmp_path / "new", "run", "new")
        process = subprocess.run([sys.executable, "-c", code, new, target, str(moment)], cwd=ROOT, env={**os.environ})
        restore_interrupted(target)
        assert weights(target) in ("old", "new"), moment
        assert [path.name for path in target.parent.iterdir()] == ["model"]
        ends.add((process.returncode, weights(target)))
    assert {(-signal.SIGKILL, "old"), (0, "new")} <= ends


def test_a_folder_that_failed_halfway_through_the_fallback_is_restored_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model(tmp_path / "model", "run", "old")
    replace, calls = os.replace, []

    def fails_second(source: Any, to: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk failed")
        replace(source, to)

    def cannot(*_: Any) -> None:
        raise OSError(errno.EINVAL, "no such rename here")

    monkeypatch.setattr(to_folder, "_rename", cannot)
    monkeypatch.setattr(os, "replace", fails_second)
    with pytest.raises(OSError, match="the disk failed"):
        publish_folder(model(tmp_path / "new", "run", "new"), target)
    assert weights(target) == "old"


def test_complete_is_not_said_of_a_model_that_is_gone_or_damaged(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run(PUBLISH_TO=str(tmp_path / "model"))
    (destination,) = destinations_of(run)
    record = destination.publish(model(tmp_path / "new", run.id))
    assert still_there(run, {"destination": str(destination), "places": [record]})
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert not still_there(run, {"destination": str(destination), "places": [record]})
    shutil.rmtree(tmp_path / "model")
    assert not still_there(run, {"destination": str(destination), "places": [record]})


# -- a bucket ------------------------------------------------------------------------------------------------------


def test_a_model_is_published_below_an_s3_prefix_with_a_manifest_and_an_older_one_of_the_run_gives_way(
    make_run: Callable[..., Any], tmp_path: Path, s3_environment: None
) -> None:
    url = f"s3://bucket/{tmp_path.name}/model"
    run = make_run(PUBLISH_TO=url)
    (destination,) = destinations_of(run)
    destination.check()
    old = model(tmp_path / "old", run.id, "old")
    (old / "model-00002.safetensors").write_bytes(b"a shard that the new model does not have")
    destination.publish(old)
    record = destination.publish(model(tmp_path / "new", run.id, "new"))
    store = open_store(url)
    assert {key.rpartition("/")[2] for key, _ in store.list("")} == {"MANIFEST.json", RECORD, "model.safetensors"}
    assert open_store("s3://bucket").get(f"{tmp_path.name}/model/model.safetensors") == b"new"
    assert destination.holds(record)
    open_store("s3://bucket").delete(f"{tmp_path.name}/model/model.safetensors")
    assert not destination.holds(record)


def test_a_prefix_that_holds_other_peoples_objects_is_refused(
    make_run: Callable[..., Any], tmp_path: Path, s3_environment: None
) -> None:
    prefix = f"{tmp_path.name}/theirs"
    open_store("s3://bucket").put(f"{prefix}/model.safetensors", b"theirs")
    run = make_run(PUBLISH_TO=f"s3://bucket/{prefix}")
    (destination,) = destinations_of(run)
    for act in (destination.check, lambda: destination.publish(model(tmp_path / "new", run.id))):
        with pytest.raises(SettingsError, match="did not write"):
            act()
    assert [key for key, _ in open_store("s3://bucket").list(prefix)] == [f"{prefix}/model.safetensors"]


def test_with_a_remote_store_and_no_destination_the_model_also_goes_to_the_store(
    make_run: Callable[..., Any], tmp_path: Path, s3_environment: None
) -> None:
    run = make_run(STORE_URL=f"s3://bucket/{tmp_path.name}/store", NEW_MODEL="tuned")
    names = [str(destination) for destination in destinations_of(run)]
    assert names == [str(tmp_path / "results" / "published" / "tuned"), f"{run.store.url}/here/published"]


# -- the Hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_hub(make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    from huggingface_hub import HfApi

    from job.hub import to_hub

    with FakeHub() as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_test_token")
        monkeypatch.setattr(to_hub, "HfApi", lambda: HfApi(endpoint=hub.url, token="hf_test_token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        run = make_run(PUBLISH_TO="hf://me/tuned")
        yield hub, run, to_hub.HubRepository(run, "me/tuned")


def test_a_repository_with_other_peoples_weights_and_card_keeps_them(on_the_hub: Any, tmp_path: Path) -> None:
    hub, run, destination = on_the_hub
    theirs = {"README.md": b"# Theirs", "model.safetensors": b"theirs", "adapter/adapter_model.safetensors": b"theirs"}
    hub.add("models/me/tuned", theirs)
    for act in (destination.check, lambda: destination.publish(model(tmp_path / "new", run.id))):
        with pytest.raises(SettingsError, match="did not write"):
            act()
    assert hub.files("models/me/tuned") == theirs


def test_a_repository_of_another_run_is_refused_and_an_empty_one_is_taken(on_the_hub: Any, tmp_path: Path) -> None:
    hub, run, destination = on_the_hub
    hub.add("models/me/tuned", {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"})
    destination.check()
    record = destination.publish(model(tmp_path / "new", run.id))
    assert destination.holds(record)
    hub.add("models/me/tuned", {**hub.files("models/me/tuned"), RECORD: b'{"run_id": "another"}'})
    with pytest.raises(SettingsError, match="another run, 'another'"):
        destination.publish(model(tmp_path / "newer", run.id))


def test_a_push_by_somebody_else_meanwhile_is_not_overwritten(
    on_the_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, run, destination = on_the_hub
    destination.publish(model(tmp_path / "first", run.id))
    look = type(destination)._own

    def then_another_pushes(self: Any, api: Any) -> Any:
        seen = look(self, api)
        hub.add("models/me/tuned", {**hub.files("models/me/tuned"), "notes.md": b"theirs"})
        return seen

    monkeypatch.setattr(type(destination), "_own", then_another_pushes)
    with pytest.raises(TransientError, match="Somebody pushed"):
        destination.publish(model(tmp_path / "second", run.id, "other weights"))
    assert hub.files("models/me/tuned")["notes.md"] == b"theirs"


def test_a_token_that_may_only_read_an_existing_repository_is_refused_before_the_training(on_the_hub: Any) -> None:
    hub, _, destination = on_the_hub
    hub.add("models/me/tuned", {".gitattributes": b""})
    hub.read_only.add("models/me/tuned")
    with pytest.raises(PermissionRefused):
        destination.check()


def test_a_commit_that_is_gone_from_the_hub_is_noticed_and_an_outage_is_not_taken_for_that(
    on_the_hub: Any, tmp_path: Path
) -> None:
    hub, run, destination = on_the_hub
    record = destination.publish(model(tmp_path / "new", run.id))
    hub.refuse = 503
    assert destination.holds(record)
    hub.refuse = None
    hub.repositories["models/me/tuned"].pop()
    assert not destination.holds(record)


def test_a_model_that_this_run_has_published_is_recognized_and_not_pushed_again(
    on_the_hub: Any, tmp_path: Path
) -> None:
    hub, run, destination = on_the_hub
    first = destination.publish(model(tmp_path / "first", run.id), tag=run.id)
    again = destination.publish(model(tmp_path / "again", run.id), tag=run.id)
    assert first == again
    assert len(hub.repositories["models/me/tuned"]) == 2  # the Hub's own first commit, and ours
    newer = destination.publish(model(tmp_path / "newer", run.id, "other weights"), tag=run.id)
    assert hub.tags["models/me/tuned", run.id] == newer["commit"] != first["commit"]


def test_a_branch_of_the_repository_takes_the_model_and_main_stays_as_it_was(on_the_hub: Any, tmp_path: Path) -> None:
    hub, run, _ = on_the_hub
    hub.add("models/me/tuned", {".gitattributes": b""})
    hub.add("models/me/tuned", {".gitattributes": b"", "model.safetensors": b"theirs", "README.md": b"# Theirs"})
    from job.hub.to_hub import HubRepository

    branch = HubRepository(run, "me/tuned@experiment")
    branch.check()
    record = branch.publish(model(tmp_path / "new", run.id))
    assert record["page"].endswith("/me/tuned/tree/experiment")
    assert hub.files("models/me/tuned", "experiment")["model.safetensors"] == b"weights"
    assert "README.md" not in hub.files("models/me/tuned", "experiment")  # it is main's, and somebody else's
    assert hub.files("models/me/tuned")["model.safetensors"] == b"theirs"
    assert str(branch.for_the_adapter()) == "hf://me/tuned@experiment-adapter"


def test_somebody_elses_adapter_branch_is_refused_before_the_training(on_the_hub: Any) -> None:
    hub, _, destination = on_the_hub
    hub.add("models/me/tuned", {".gitattributes": b""})
    hub.branches["models/me/tuned", "adapter"] = [("f" * 40, {"adapter_model.safetensors": b"theirs"})]
    with pytest.raises(SettingsError, match=r"hf://me/tuned@adapter contains files that this job did not write"):
        destination.check()


def test_large_files_are_sent_in_parts_and_not_again_after_a_failure(
    on_the_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, run, destination = on_the_hub
    monkeypatch.setattr("job.hub.to_hub._PAUSES_SECONDS", (0.01,))
    monkeypatch.setattr("job.hub._PAUSES_SECONDS", (0.01,))
    hub.part_bytes = 1000
    repository = model(tmp_path / "new", run.id, "w" * 4500)
    hub.fault = lambda method, path: Fault(status=503) if "/commit/" in path else None
    with pytest.raises(TransientError):
        destination.publish(repository)
    puts = [path for method, path, _ in hub.requests if method == "PUT"]
    assert len(puts) == 5
    hub.fault = None
    destination.publish(repository)
    assert [path for method, path, _ in hub.requests if method == "PUT"] == puts
    assert hub.files("models/me/tuned")["model.safetensors"] == b"w" * 4500


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=429, retry_after=0), Fault(ends="before"), Fault(ends="after"), Fault(seconds=0.2)], ids=["500", "429", "no answer", "a lost answer", "slow"])  # fmt: skip
@pytest.mark.parametrize("where", ["/commit/", "/preupload/", "/info/lfs", "/lfs/", "/tree/", "/tag/", "repos/create"])
def test_a_fault_that_passes_leaves_one_commit(
    on_the_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, where: str
) -> None:
    hub, run, destination = on_the_hub
    monkeypatch.setattr("job.hub.to_hub._PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr("job.hub._PAUSES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr("time.sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    left = [1]

    def once(method: str, path: str) -> Fault | None:
        if where in path and left:
            left.pop()
            return fault
        return None

    hub.fault = once
    destination.publish(model(tmp_path / "new", run.id), tag=run.id)
    assert left == []
    assert len(hub.repositories["models/me/tuned"]) == 2
    assert hub.files("models/me/tuned")["model.safetensors"] == b"weights"
    assert hub.tags["models/me/tuned", run.id] == hub.repositories["models/me/tuned"][-1][0]


@pytest.mark.parametrize(
    ("status", "error"), [(401, PermissionRefused), (403, PermissionRefused), (412, TransientError)]
)
def test_a_commit_that_is_refused_is_not_tried_again(
    on_the_hub: Any, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    hub, run, destination = on_the_hub
    tried: list[str] = []

    def refuse(method: str, path: str) -> Fault | None:
        if "/commit/" not in path:
            return None
        tried.append(path)
        return Fault(status=status)

    hub.fault = refuse
    with pytest.raises(error):
        destination.publish(model(tmp_path / "new", run.id))
    assert len(tried) == 1
    assert set(hub.files("models/me/tuned")) == {".gitattributes"}


_PUSHED = """
    import sys
    from pathlib import Path
    from job.environment import load_settings
    from job.hub.to_hub import HubRepository
    from job.run import Run
    run = Run.of(load_settings())
    print("begins", flush=True)
    HubRepository(run, "me/tuned").publish(Path(sys.argv[1]), tag=run.id)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replaces", [False, True], ids=["a new repository", "this run's former model"])
def test_a_publication_that_is_killed_again_and_again_is_never_half_there(
    on_the_hub: Any, tmp_path: Path, replaces: bool, kills: int
) -> None:
    """Each kill comes before or after a random one of its requests was answered."""
    hub, run, destination = on_the_hub
    hub.part_bytes = 1 << 20
    old = {}
    if replaces:
        destination.publish(model(tmp_path / "old", run.id, "old"), tag=run.id)
        old = ours(hub)
    repository = model(tmp_path / "new", run.id, "new")
    for number in range(4):
        (repository / f"model-{number}.safetensors").write_bytes(os.urandom(3 << 20))
    new = {path.relative_to(repository).as_posix(): path.read_bytes() for path in repository.rglob("*")}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test_token", "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-c", textwrap.dedent(_PUSHED), str(repository)]
    random, killed_while = Random(kills), set()
    for _ in range(kills):
        left = [random.randrange(1, 36)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

        def kill(method: str, path: str, left: list[int] = left, process: Any = process) -> Fault | None:
            left[0] -= 1
            if left[0] != 0:
                return None
            killed_while.add(path.split("/")[1] if path.startswith("/lfs") else path.split("/")[-2])
            done = random.random() < 0.5
            if not done:
                process.kill()
                process.wait()
                return Fault(ends="before")
            return Fault(ends="after")  # and the kill follows below, if the client has not given up

        hub.fault = kill
        while process.poll() is None and left[0] > 0:
            time.sleep(0.005)
        process.kill()
        process.wait()
        hub.fault = None
        assert ours(hub) in ({}, old, new)
        assert len(hub.repositories.get("models/me/tuned", ())) <= (3 if replaces else 2)
        if ours(hub) == new:  # published after all: take that back, so that the next kill finds something to do
            hub.repositories["models/me/tuned"].pop()
            hub.blobs.clear()
            hub.tags.clear()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert ours(hub) == new
    assert len(hub.repositories["models/me/tuned"]) == (3 if replaces else 2)
    assert hub.tags["models/me/tuned", run.id] == hub.repositories["models/me/tuned"][-1][0]
    assert len(killed_while) > (1 if kills < 10 else 4), killed_while


def ours(hub: FakeHub) -> dict[str, bytes]:
    """What the repository holds, but for the Hub's own file."""
    here = hub.files("models/me/tuned") if "models/me/tuned" in hub.repositories else {}
    return {name: data for name, data in here.items() if name != ".gitattributes"}


@pytest.mark.slow
def test_a_file_of_six_gigabytes_goes_through(on_the_hub: Any, tmp_path: Path) -> None:
    hub, run, destination = on_the_hub
    hub.part_bytes = 512 << 20
    repository = model(tmp_path / "new", run.id)
    with (repository / "model-2.safetensors").open("wb") as stream:
        stream.truncate(6 << 30)
    destination.publish(repository)
    (listed,) = [data for name, data in hub.files("models/me/tuned").items() if name == "model-2.safetensors"]
    assert listed.size == 6 << 30


# -- several places ------------------------------------------------------------------------------------------------


def copied(finished: Job, tmp_path: Path) -> Job:
    """A finished run of one's own."""
    shutil.copytree(finished.environment["FT_OUTPUT_DIR"], tmp_path / "results", symlinks=True)
    return Job({**finished.environment, "FT_OUTPUT_DIR": str(tmp_path / "results")})


@pytest.mark.xdist_group("uninterrupted")
def test_every_named_place_gets_the_model_and_each_counts(
    uninterrupted: Job, tmp_path: Path, s3_environment: None
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    bucket = f"s3://bucket/{tmp_path.name}/model"
    job = copied(uninterrupted, tmp_path)
    places = ",".join(map(str, [folders[0], bucket, folders[1]]))
    result = job.run(FT_PUBLISH_TO=places)
    assert result.code == 0, result.stderr
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} for folder in folders
    ]
    assert names[0] == names[1]
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "README.md"} <= names[0]
    assert {key for key, _ in open_store(bucket).list("")} == names[0] | {"MANIFEST.json"}
    assert job.run(FT_PUBLISH_TO=places).ended["publish"] == "skipped"
    shutil.rmtree(folders[1])
    assert job.run(FT_PUBLISH_TO=places).code == 0
    assert (folders[1] / "model.safetensors").is_file()


def test_the_adapter_alone_is_published_where_peft_finds_it_and_nothing_is_merged(job: Job, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    result = job.run(FT_PUBLISH="adapter", FT_PUBLISH_TO=str(tmp_path / "adapter"), FT_MAX_STEPS="1")
    assert result.code == 0, result.stderr
    assert "merge" not in result.ended
    names = {path.name for path in (tmp_path / "adapter").rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"model.safetensors", "merge_proof.json"} & names
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = job.environment["FT_MODEL_NAME"]  # as on a machine that has it
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").peft_config


@pytest.mark.xdist_group("uninterrupted")
def test_the_merged_model_alone_is_published_without_the_adapter(uninterrupted: Job, tmp_path: Path) -> None:
    result = copied(uninterrupted, tmp_path).run(FT_PUBLISH="merged", FT_PUBLISH_TO=str(tmp_path / "merged"))
    assert result.code == 0, result.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert not (tmp_path / "merged" / "adapter").exists()


def test_a_merge_that_fails_its_proof_ends_with_65_and_the_adapter_is_on_the_hub(
    job: Job, hub: FakeHub, tmp_path: Path
) -> None:
    job.environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test_token"}  # fmt: skip
    result = job.run(FT_PUBLISH_TO="hf://me/tuned", FT_MERGE_MAX_KL="1e-30", FT_MAX_STEPS="1")
    assert result.code == 65
    assert "KL" in result.error["message"]
    assert "adapter_model.safetensors" in hub.files("models/me/tuned", "adapter")
    assert "model.safetensors" not in hub.files("models/me/tuned")
    assert job.run(FT_PUBLISH_TO="hf://me/tuned", FT_MAX_STEPS="1").code == 0
    assert "model.safetensors" in hub.files("models/me/tuned")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("hf://me/tuned,hf:/me/other", "as hf://user/name"), ("hf://me/tuned@", "hf://user/name@branch"), ("s3://bucket/a,s3://bucket", "prefix"),
        ("hf://me/a b", "hf://user/name"), ("./a,./a", "twice"),
    ],
)  # fmt: skip
def test_each_wrong_place_in_a_list_is_named(monkeypatch: pytest.MonkeyPatch, value: str, wanted: str) -> None:
    from job.environment import load_settings

    monkeypatch.setenv("FT_PUBLISH_TO", value)
    monkeypatch.setenv("HF_TOKEN", "hf_test_token")
    with pytest.raises(SettingsError, match=wanted):
        load_settings()
