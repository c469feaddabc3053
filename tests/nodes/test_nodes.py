"""Several processes and nodes, real ones on this machine: losing one stops all, and all resume together."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from job.nodes import heartbeat, record, rendezvous
from tests.conftest import Job, Result, finished
from tests.supervision.test_interruptions import resumed_step, signal_tree, tree_of

ADAPTER = "adapter/adapter_model.safetensors"
BOUND_SECONDS = 60


@dataclass
class Node:
    """A started node whose log is followed as it is written."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def await_line(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline and self.process.poll() is None, "".join(self.lines[-20:])
            time.sleep(0.05)

    def end(self, seconds: float) -> Result:
        self.process.wait(timeout=seconds)
        self.reader.join(timeout=10)
        assert self.process.stderr is not None
        return finished(self.process, "".join(self.lines), self.process.stderr.read())


def start_two(job: Job, **settings: str) -> tuple[Node, Node]:
    first, second = (Node(job.start(FT_NNODES="2", FT_NODE_RANK=str(rank), **settings)) for rank in range(2))
    return first, second


def adapter(job: Job, folder: Path | None = None) -> dict[str, torch.Tensor]:
    output = folder or Path(job.environment["FT_OUTPUT_DIR"])
    return dict(load_file(output / "runs" / "test-run" / "train" / ADAPTER))


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_losing_either_node_stops_both_in_time_and_both_finish_as_two_processes_on_one_node_do(
    job: Job, tmp_path: Path
) -> None:
    """The second node dies, then the first does, then the second is asked to stop, then nothing happens."""
    job.environment |= {
        "FT_MAX_STEPS": "120",
        "FT_SAVE_STEPS": "5",
        "FT_LEARNING_RATE": "1e-3",
        "FT_STAGES": "train,sample",
        "FT_SAMPLE_MAX_NEW_TOKENS": "2",
        "FT_LOG_LEVEL": "debug",
    }
    resumed = []
    for victim, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGTERM)):
        nodes = start_two(job)
        nodes[0].await_line('"committed": true' if number == signal.SIGKILL else '"event": "progress", "done"')
        time.sleep(1)
        if number == signal.SIGKILL:
            signal_tree(nodes[victim].process.pid, number)
        else:
            nodes[victim].process.send_signal(number)
        began = time.monotonic()
        results = [node.end(BOUND_SECONDS) for node in nodes]
        assert time.monotonic() - began < BOUND_SECONDS
        assert results[1 - victim].code == 75, results[1 - victim].stderr
        assert results[victim].code == (75 if number == signal.SIGTERM else -signal.SIGKILL), results[victim].stderr
        resumed += [resumed_step(result.events) for result in results[:1] if "Resuming from" in result.stdout]
    nodes = start_two(job)
    first, second = (node.end(300) for node in nodes)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    resumed.append(resumed_step(first.events))
    assert resumed == sorted(resumed) and resumed[0] > 0
    assert resumed_step(second.events) == resumed[-1]  # both resume from the same checkpoint
    assert set(second.ended) == {"preflight", "train"}  # only the first node samples

    again = [node.end(60) for node in start_two(job)]
    assert [result.code for result in again] == [0, 0]
    assert set(again[0].ended.values()) == {"skipped"}

    on_one = job.run(FT_NPROC_PER_NODE="2", FT_OUTPUT_DIR=str(tmp_path / "one"))
    assert on_one.code == 0, on_one.stderr
    ours, theirs = adapter(job), adapter(job, tmp_path / "one")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


_MEMORY_ENDS = """
import builtins, os, sys
real = builtins.__import__
passes = 0

def full(self, *arguments, **named):
    global passes
    passes += 1
    if os.environ.get("RANK") == "1" and self.kept and passes > 9:  # five of them are the proof's
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return backward(self, *arguments, **named)

def patched(name, *rest, **named):
    global backward
    module = real(name, *rest, **named)
    layer = sys.modules.get("job.model.fused.layer")
    if layer is not None and hasattr(layer, "fuse_layer") and layer.FusedLayer.backward_ is not full:
        backward, layer.FusedLayer.backward_ = layer.FusedLayer.backward_, full
    return module

builtins.__import__ = patched
"""


def test_two_ranks_continue_with_a_smaller_plan_when_one_runs_out_of_memory(job: Job, tmp_path: Path) -> None:
    job.environment |= {
        "FT_STAGES": "train", "FT_NPROC_PER_NODE": "2", "FT_DECODER_LAYERS": "fused", "FT_PADDING_FREE": "true",
    }  # fmt: skip
    straight = job.run(FT_RECOMPUTED_LAYERS="2", FT_OUTPUT_DIR=str(tmp_path / "straight"))
    assert straight.code == 0, straight.stderr
    (tmp_path / "sitecustomize.py").write_text(_MEMORY_ENDS, encoding="utf-8")
    result = job.run(FT_RECOMPUTED_LAYERS="0", FT_OUTPUT_DIR=str(tmp_path / "full"), PYTHONPATH=str(tmp_path))
    assert result.code == 0, result.stderr
    warnings = [event["message"] for event in result.events if event["level"] == "warning"]
    assert len([text for text in warnings if "with a smaller plan" in text]) == 2
    assert "Resuming from the checkpoint of step 2." in [event.get("message") for event in result.events]
    adapters = [
        load_file(tmp_path / name / "runs" / "test-run" / "train" / "adapter" / "adapter_model.safetensors")
        for name in ("straight", "full")
    ]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_two_ranks_may_split_their_batches_into_different_numbers_of_parts(job: Job, tmp_path: Path) -> None:
    """One rank has short rows and the other long ones, yet their collective operations must still match up.

    What they learn and log is what two ranks with plain layers do.
    """
    job.environment |= {
        "FT_STAGES": "train", "FT_NPROC_PER_NODE": "2", "FT_PADDING_FREE": "true", "FT_GROUP_BY_LENGTH": "false",
        "FT_LORA_DROPOUT": "0",
    }  # fmt: skip
    folders = [tmp_path / name for name in ("plain", "fused")]
    for folder in folders:
        parts = {"FT_MICRO_BATCH_TOKENS": "150"} if folder.name == "fused" else {}
        result = job.run(FT_OUTPUT_DIR=str(folder), FT_DECODER_LAYERS=folder.name, **parts)
        assert result.code == 0, result.stderr
    runs = [folder / "runs" / "test-run" / "train" for folder in folders]
    adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-5)
    plain, fused = (json.loads((run / "trainer_state.json").read_text())["log_history"] for run in runs)
    names = {"num_tokens", "loss", "entropy", "mean_token_accuracy"}
    for one, other in zip(plain, fused, strict=True):
        assert names & one.keys() == names & other.keys()
        assert {name: one[name] for name in names & one.keys()} == pytest.approx(
            {name: other[name] for name in names & other.keys()}, rel=1e-4
        )
    assert any(names <= entry.keys() for entry in plain)


def test_two_ranks_learn_what_one_rank_with_twice_the_accumulation_learns(job: Job, tmp_path: Path) -> None:
    """80 rows make ten whole steps per epoch. Where the last step lacks rows, accelerate repeats some."""
    job.environment |= {
        "FT_STAGES": "train",
        "FT_LORA_DROPOUT": "0",
        "FT_MAX_STEPS": "8",
        "FT_DATASET_SPLIT": "train[:100]",
        "FT_LEARNING_RATE": "1e-3",
    }
    two = job.run(FT_NPROC_PER_NODE="2")
    one = job.run(FT_GRADIENT_ACCUMULATION_STEPS="2", FT_OUTPUT_DIR=str(tmp_path / "one"))
    assert (two.code, one.code) == (0, 0), two.stderr + one.stderr
    ours, theirs = adapter(job), adapter(job, tmp_path / "one")
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-4, atol=1e-6)
    losses = [
        [event["loss"] for event in result.events if event.get("event") == "progress" and "loss" in event]
        for result in (two, one)
    ]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=1e-4)


@pytest.mark.slow
def test_killing_one_rank_ends_the_job_in_time_with_75_and_the_next_start_resumes(job: Job) -> None:
    job.forks = False
    job.environment |= {
        "FT_STAGES": "train",
        "FT_NPROC_PER_NODE": "2",
        "FT_MAX_STEPS": "400",
        "FT_SAVE_STEPS": "5",
        "FT_LOG_LEVEL": "debug",
    }
    node = Node(job.start())
    node.await_line('"committed": true')
    ranks = [pid for pid in tree_of(node.process.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    import os

    os.kill(ranks[0], signal.SIGKILL)
    result = node.end(BOUND_SECONDS)
    assert result.code == 75, result.stderr
    assert re.search(r"killed by SIGKILL \(ranks: (0, )?1\)", result.error["message"])
    again = job.run()
    assert again.code == 0, again.stderr
    assert resumed_step(again.events) >= 5


def test_a_node_that_cannot_continue_tells_the_others_why(job: Job, tmp_path: Path) -> None:
    """The second node was given other data, and waiting for it would cost hours.

    Which mistake it meets depends on whether it starts before or after the first node has started the run.
    """
    first = Node(job.start(FT_NNODES="2", FT_NODE_RANK="0"))
    second = Node(
        job.start(FT_NNODES="2", FT_NODE_RANK="1", FT_DATASET_TEXT_FIELD="text", FT_DATASET_NAME=str(broken(tmp_path)))
    )
    results: list[Result] = [first.end(120), second.end(120)]
    assert [result.code for result in results] in ([65, 65], [78, 78]), results[0].stderr + results[1].stderr
    assert "Node 1" in results[0].error["message"]


def broken(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text('{"question": "Who?"}\n', encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"FT_NNODES": "2"}, "FT_NNODES=2 needs FT_NODE_RANK"),
        ({"FT_NNODES": "2", "FT_NODE_RANK": "2"}, "FT_NODE_RANK=2: must be less than FT_NNODES=2"),
        ({"FT_NODE_RANK": "1"}, "Set FT_NNODES, the number of nodes, too"),
        ({"FT_MASTER_ADDR": "http://a:29400"}, "Set the port in FT_MASTER_PORT"),
        ({"FT_SHARDING": "full", "FT_DEVICE_MAP": "balanced"}, "FT_SHARDING=full spreads the model itself"),
    ],
)
def test_an_impossible_rank_is_refused_immediately(job: Job, settings: dict[str, str], complaint: str) -> None:
    result = job.run(**settings)
    assert result.code == 78
    assert complaint in result.error["message"]


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, (0, 1)),
        (
            {"SLURM_NNODES": "4", "SLURM_NODEID": "0"},
            (0, 1),
        ),  # a batch script without srun: one process on one of four nodes
        ({"SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "3"}, (3, 4)),
    ],
)
def test_the_rank_of_a_node_is_what_its_scheduler_says(environ: dict[str, str], place: tuple[int, int]) -> None:
    from job.cluster import this_node

    node = this_node(environ=environ)
    assert (node.index, node.count) == place


def test_an_indexed_job_gives_the_rank_and_a_setting_overrides_it() -> None:
    from job.cluster import this_node

    with pytest.raises(ValueError, match="set it to the Job's completions"):
        this_node(environ={"JOB_COMPLETION_INDEX": "0"})
    assert this_node(nnodes=1, environ={"JOB_COMPLETION_INDEX": "5"}).index == 0  # its pods each train alone
    assert this_node(nnodes=8, environ={"JOB_COMPLETION_INDEX": "5"}).index == 5
    assert this_node(nnodes=8, node_rank=2, environ={"JOB_COMPLETION_INDEX": "5"}).index == 2


def test_the_first_node_does_not_wait_for_a_dead_one(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record in the store from an earlier start of the second node is not a node, even if it says ready."""
    from job.errors import TransientError

    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "_ABSENT_SECONDS", 1.5)
    run = make_run(NNODES="2", NODE_RANK="0")
    stale = {"node": 1, "name": "there", "holder": "dead", "beat": 9, "state": "ready"}
    run.store.put("here/nodes/attempt-0001/node-0001.json", json.dumps(stale).encode())
    first = rendezvous.FirstNode(run, lambda: time.sleep(0.05), lambda text: None)
    with pytest.raises(TransientError, match="Node 1 of 2 did not start"), first.leading(1):
        first.gather()
    ending = json.loads(run.store.get("here/nodes/attempt-0001/node-0000.json"))
    assert (ending["state"], ending["exit_code"]) == ("ended", 75)


def test_a_silent_node_is_reported_but_not_while_the_store_is_unreachable(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.errors import JobError, TransientError

    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(record, "DEAD_SECONDS", 0.6)
    first_run, second_run = make_run(NNODES="2", NODE_RANK="0"), make_run(NNODES="2", NODE_RANK="1")
    first_run.store.put("here/lease.json", b'{"attempt": 1, "released": false, "inherited": []}')
    first = rendezvous.FirstNode(first_run, lambda: time.sleep(0.02), lambda text: None)
    second = rendezvous.OtherMember(second_run, lambda: time.sleep(0.02), lambda text: None)
    lost: list[JobError] = []
    with first.leading(1):
        follower = threading.Thread(target=_follow, args=(second,))
        follower.start()
        first.gather()
        first.announce(None)
        with first.watched(lost.append):
            time.sleep(1)
            assert lost == []
            with monkeypatch.context() as outage:
                outage.setattr(second_run.store, "put", _away)
                with monkeypatch.context() as ours:
                    ours.setattr(first_run.store, "get", _away)
                    time.sleep(1.5)
                time.sleep(0.2)  # we can read again, but the other's last heartbeat is old
            time.sleep(1)
            assert lost == []
            second.heartbeat._over.set()  # its thread ends as if its machine had
            deadline = time.monotonic() + 10
            while not lost:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert isinstance(lost[0], TransientError) and "has not been heard from" in lost[0].message
    follower.join()


def _follow(node: Any) -> None:
    node.heartbeat._thread.start()
    node.await_announcement(lambda: False)


def _away(*_: object) -> bytes:
    from job.errors import TransientError

    raise TransientError("The store is away.")
