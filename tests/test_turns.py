"""Trainers that a benchmark lets train in turns (benchmarks/turns.py), as processes of their own."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

from benchmarks.turns import Player, Windows, conduct

# Trains like transformers' Trainer, and notes when each step began and ended. "dies" ends in its second window.
TRAINER = """
import json, os, sys, time
from types import SimpleNamespace
# the two take seconds to import, and a callback needs no more of them
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
sys.modules["transformers"] = SimpleNamespace(TrainerCallback=object)
from benchmarks.turns import Turn

turn = Turn.of_environment()
turn.await_("load")
callback, state = turn.callback(), SimpleNamespace(global_step=0)
callback.on_train_begin(None, state)
with open(sys.argv[1], "a") as notes:
    while state.global_step < turn.all_steps:
        callback.on_step_begin(None, state)
        began = time.time()
        turn.count(100 + state.global_step)
        time.sleep(0.02)
        print(json.dumps([state.global_step, began, time.time()]), file=notes, flush=True)
        state.global_step += 1
        if sys.argv[2] == "dies" and state.global_step == 6:
            sys.exit(1)
        callback.on_step_end(None, state)
"""


def player(name: str, tmp_path: Path, windows: Windows) -> Player:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return Player(name, [sys.executable, "-c", TRAINER, str(tmp_path / name), name], environment, windows)


def test_trainers_train_in_turns_and_one_that_dies_is_left_out(tmp_path: Path) -> None:
    windows = Windows(warm_up=2, count=3, steps=2, lead=1)
    players = [player(name, tmp_path, windows) for name in ("one", "dies", "two")]
    found = list(conduct(players, tmp_path / "turns", limit=60))
    assert [name for name, _ in found] == ["one", "dies", "two", "one", "two", "one", "two"]
    # the first step of each window, which has no memory yet, does not count
    assert [figures["tokens"] for name, figures in found if name == "two"] == [103 + 104, 106 + 107, 109 + 110]
    assert all(0.04 <= figures["seconds"] < 5 for _, figures in found)
    steps = [json.loads(line) for name in ("one", "dies", "two") for line in (tmp_path / name).read_text().splitlines()]
    steps.sort(key=lambda step: step[1])
    assert all(before[2] <= after[1] for before, after in itertools.pairwise(steps)), "two trained at the same time"
    assert len(steps) == 2 * windows.all_steps + 6


def test_whole_groups_of_batches_are_measured_from_their_first_step(tmp_path: Path) -> None:
    windows = Windows(warm_up=3, count=2, steps=3, lead=0, releases=False)
    found = list(conduct([player("one", tmp_path, windows)], tmp_path / "turns", limit=60))
    assert [figures["tokens"] for _, figures in found] == [103 + 104 + 105, 106 + 107 + 108]
