"""One writer at a time, decided by the store and never by a clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.checkpoints import lease as module
from job.checkpoints.lease import Commit, Lease, LeaseRecord, Superseded, every_commit
from job.checkpoints.manifest import commit
from job.checkpoints.restore import committed_checkpoints, step_of
from job.checkpoints.retention import apply_retention
from job.errors import InputError, Stopped, TransientError
from job.storage import Conflict


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(module, "EXPIRE_SECONDS", 2.0)


@pytest.fixture(params=["folder", "s3"])
def machine(request: pytest.FixtureRequest, make_run: Callable[..., Any], tmp_path: Path) -> Callable[[str], Any]:
    """The run as machine `name` sees it. Each machine has its own disk, and all share one store."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
    url = f"s3://bucket/{tmp_path.name}" if request.param == "s3" else str(tmp_path / "store")
    return lambda name: make_run(OUTPUT_DIR=str(tmp_path / name), STORE_URL=url)


def take(run: Any, **options: Any) -> Lease:
    return Lease.take(run, options.get("say", lambda text: None), options.get("stop_requested", lambda: False))


def some_files(tmp_path: Path) -> Path:
    folder = tmp_path / "artefact"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text("{}", encoding="utf-8")
    return folder


def test_every_start_is_a_new_attempt(machine: Callable[[str], Any]) -> None:
    run = machine("one")
    for number in (1, 2, 3):
        lease = take(run)
        assert lease.record.attempt == number == LeaseRecord.read(run).attempt
        lease.release()
    assert LeaseRecord.read(run).released


def test_a_start_in_the_folder_of_a_dead_one_does_not_wait(
    machine: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = take(machine("one"))
    dead._folder_lock.close()  # as the kernel does when a process is killed
    monkeypatch.setattr(module, "EXPIRE_SECONDS", 600.0)
    assert take(machine("one")).record.attempt == 2


def test_the_next_attempt_knows_what_a_killed_one_lost_and_how_a_stopped_one_ended(
    machine: Callable[[str], Any],
) -> None:
    killed = take(machine("one"))
    killed.keep_alive(lambda error: None, lambda: 41.5)
    killed.renew()
    killed._ended.set()
    killed._folder_lock.close()
    stopped = take(machine("one"))
    assert (stopped.former.exit_code, stopped.former.unsaved_seconds) == (None, 41.5)
    assert stopped.record.unsaved_seconds == 0
    stopped.release("a stop", exit_code=75)
    after = take(machine("one"))
    assert (after.former.exit_code, after.former.unsaved_seconds) == (75, 0)
    assert after.record.exit_code is None
    after.release()


def test_a_second_start_in_the_same_folder_is_refused(machine: Callable[[str], Any]) -> None:
    holder = take(machine("one"))
    with pytest.raises(TransientError, match="is working in") as caught:
        take(machine("one"))
    assert caught.value.exit_code == 75
    holder.renew()


def test_another_machine_waits_for_a_holder_that_may_be_alive_and_then_takes_over(
    machine: Callable[[str], Any],
) -> None:
    take(machine("one"))
    said: list[str] = []
    began = time.monotonic()
    assert take(machine("two"), say=said.append).record.attempt == 2
    assert time.monotonic() - began > 1
    assert "may still be alive" in said[0]


def test_another_machine_is_refused_while_the_holder_renews(machine: Callable[[str], Any]) -> None:
    holder = take(machine("one"))
    holder.keep_alive(lambda reason: None)
    with pytest.raises(TransientError, match="is still working on"):
        take(machine("two"))
    holder.release()
    assert take(machine("two")).record.attempt == 2


def test_a_stop_request_ends_the_wait(machine: Callable[[str], Any]) -> None:
    take(machine("one"))
    with pytest.raises(Stopped):
        take(machine("two"), stop_requested=lambda: True)


def test_a_holder_that_wakes_up_too_late_is_told_and_may_not_write(
    machine: Callable[[str], Any], tmp_path: Path
) -> None:
    stale_run = machine("one")
    stale = take(stale_run)
    fresh = take(machine("two"))
    with pytest.raises(Superseded, match="Attempt 2 of run 'here'") as caught:
        stale.renew()
    assert caught.value.exit_code == 75
    with pytest.raises(Superseded):
        commit(stale_run.store, "here/stages/train/attempt-0001", some_files(tmp_path), "f", stale.renew)
    stale.release()  # releases only its own lease
    assert not LeaseRecord.read(stale_run).released
    fresh.renew()
    told = threading.Event()
    stale._ended.clear()
    stale.keep_alive(lambda reason: told.set())
    assert told.wait(10)


def test_a_commit_by_a_stale_holder_does_not_count(machine: Callable[[str], Any], tmp_path: Path) -> None:
    run = machine("one")
    stale = take(run)
    before = Commit("checkpoints/step-00000002", 1)
    commit(run.store, f"{run.id}/{before.folder}", some_files(tmp_path), "f", stale.renew)
    fresh = take(machine("two"))
    # It was suspended after checking that it held the lease and before writing. It continues now:
    slipped = Commit("checkpoints/step-00000004", 1)
    commit(run.store, f"{run.id}/{slipped.folder}", some_files(tmp_path), "f")
    assert fresh.record.commits(run, "checkpoints") == [before]
    fresh.release()
    assert take(machine("three")).record.commits(run, "checkpoints") == [before]


def test_exactly_one_of_several_simultaneous_starts_gets_the_lease(machine: Callable[[str], Any]) -> None:
    runs = [machine(f"machine {number}") for number in range(4)]
    attempts: list[int] = []
    refused: list[Exception] = []

    def start(run: Any) -> None:
        try:
            attempts.append(take(run).record.attempt)
        except TransientError as error:
            refused.append(error)

    threads = [threading.Thread(target=start, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) + len(refused) == 4
    assert len(attempts) == len(set(attempts))  # no two share a number


def test_a_renewal_whose_response_was_lost_is_recognised_as_ours(
    machine: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = machine("one")
    lease = take(run)
    put = type(run.store).put_if_unchanged
    calls: list[str] = []

    def put_and_lose_the_answer(self: Any, key: str, data: bytes, version: str) -> str:
        calls.append(key)
        result = put(self, key, data, version)
        if len(calls) == 1:
            raise Conflict(key)  # what a client gets when it retries a write that had succeeded
        return result

    monkeypatch.setattr(type(run.store), "put_if_unchanged", put_and_lose_the_answer)
    lease.renew()
    lease.renew()
    assert LeaseRecord.read(run) == lease.record


def test_a_lease_whose_clock_is_far_ahead_is_waited_for_no_longer_than_any_other(machine: Callable[[str], Any]) -> None:
    ahead = take(machine("one"))
    ahead._write(replace(ahead.record, renewed=time.time() + 3600))
    began = time.monotonic()
    assert take(machine("two")).record.attempt == 2
    assert time.monotonic() - began < 20


def test_after_somebody_deleted_the_lease_every_commit_counts_and_no_number_is_reused(
    machine: Callable[[str], Any], tmp_path: Path
) -> None:
    run = machine("one")
    take(run).release()
    second = take(run)
    place = Commit("checkpoints/step-00000002", 2)
    commit(run.store, f"{run.id}/{place.folder}", some_files(tmp_path), "f", second.renew)
    second.release()
    run.store.delete(f"{run.id}/lease.json")
    following = take(run)
    assert following.record.attempt == 3
    assert following.record.commits(run, "checkpoints") == [place]


@pytest.mark.parametrize("broken", ['{"attempt": 1', "[]", '{"inherited": 3}', '{"inherited": [], "unsaved_seconds": "x"}', '{"inherited": [], "exit_code": []}',
    "", '{"attempt": "7", "inherited": []}', '{"inherited": [], "exit_code": Infinity}', '{"inherited": [], "expires_seconds": 1e999}',
    '{"inherited": [1, {}]}', '{"inherited": [], "idle": "x"}', "[" * 100_000])  # fmt: skip
def test_a_lease_that_cannot_be_read_is_named_and_no_start_goes_on_without_it(
    machine: Callable[[str], Any], broken: str
) -> None:
    run = machine("one")
    take(run).release()
    _, version = run.store.get_with_version(f"{run.id}/lease.json")
    run.store.put_if_unchanged(f"{run.id}/lease.json", broken.encode(), version)
    with pytest.raises(InputError, match=r"lease\.json is not what this job writes") as caught:  # it will never heal
        take(run)
    assert "delete that object" in caught.value.hint


def test_what_people_have_put_beside_the_checkpoints_is_neither_read_nor_deleted(
    machine: Callable[[str], Any], tmp_path: Path
) -> None:
    run = machine("one")
    lease = take(run)
    copy = Commit("checkpoints/old", 1)
    for place in (copy, *(Commit(f"checkpoints/step-0000000{step}", 1) for step in (1, 2, 3))):
        commit(run.store, f"{run.id}/{place.folder}", some_files(tmp_path), "f")
    lease.release()
    run.store.delete(f"{run.id}/lease.json")
    following = take(run)
    assert [step_of(one) for one in committed_checkpoints(run, following.record)] == [3, 2, 1]
    assert [one.artefact for one in apply_retention(run, following, frozenset())] == ["checkpoints/step-00000001"]
    assert copy in list(every_commit(run, "checkpoints"))
