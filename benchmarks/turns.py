"""Several trainers with their models on one GPU, of which one trains at a time, some steps each.

Starting a trainer takes a minute or two, and a card or a host that slows down would slow down one of two runs. So all
start, and then take turns: a warm-up each, then a number of windows. Between them a trainer's cached memory is given
back to the GPU. What is measured begins some steps into a window, when it has its memory again.

`conduct` starts the trainers and decides. In each of them a `Turn` waits and reports, through files in a folder. The job
takes part by `python -m benchmarks.turns STAGE`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_VARIABLE = "BENCHMARK_TURN"
_PAUSE = 0.02  # seconds


@dataclass(frozen=True)
class Windows:
    """`warm_up` steps, and then `count` windows of `steps` measured steps, after `lead` steps each.

    `releases` says whether memory that is cached between windows is given back.
    """

    warm_up: int
    count: int
    steps: int
    lead: int = 1
    releases: bool = True

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.count * (self.lead + self.steps)

    def begins(self) -> dict[int, str]:
        """The steps before which a trainer waits, with the names of what it then waits for."""
        windows = {self.warm_up + index * (self.lead + self.steps): f"window {index}" for index in range(self.count)}
        return {0: "warm-up", **windows}


class Turn:
    """A trainer's side. `callback` is for transformers' Trainer, and `count` for what it trains on in each step."""

    def __init__(self, folder: Path, name: str, windows: Windows) -> None:
        self._folder, self._name, self._windows = folder, name, windows
        self._tokens = 0

    @classmethod
    def of_environment(cls) -> Turn | None:
        """None if this process takes part in no turns."""
        if _VARIABLE not in os.environ:
            return None
        told = json.loads(os.environ[_VARIABLE])
        return cls(Path(told["folder"]), told["name"], Windows(**told["windows"]))

    @property
    def all_steps(self) -> int:
        return self._windows.all_steps

    def await_(self, what: str) -> None:
        while not (self._folder / f"{self._name}.{what}.go").exists():
            time.sleep(_PAUSE)

    def report(self, what: str, **figures: Any) -> None:
        place = self._folder / f"{self._name}.{what}.done"
        new = place.with_suffix(".new")
        new.write_text(json.dumps(figures), encoding="utf-8")
        new.rename(place)

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        windows, begins = self._windows, self._windows.begins()
        on_gpu = torch.cuda.is_available()
        turn, name, began, tokens = self, "", 0.0, 0

        def now() -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        class Waits(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turn.report("ready")

            def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                nonlocal name, began, tokens
                if state.global_step in begins:
                    name = begins[state.global_step]
                    turn.await_(name)
                    began, tokens = now(), turn._tokens

            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                nonlocal began, tokens
                done = state.global_step
                if windows.lead and done - windows.lead in begins and done > windows.lead:
                    began, tokens = now(), turn._tokens
                if done in begins or done == windows.all_steps:
                    seconds = now() - began
                    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
                    if on_gpu and windows.releases:
                        torch.cuda.empty_cache()
                    turn.report(name, seconds=seconds, tokens=turn._tokens - tokens, peak_bytes=peak)

        return Waits()


@dataclass(frozen=True)
class Player:
    """A trainer to be started. One that `waits` loads its model when those before it have theirs."""

    name: str
    command: list[str]
    environment: dict[str, str]
    windows: Windows
    waits: bool = True


def conduct(players: list[Player], folder: Path, limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Start all, let them train in turns, and return each window's figures as they come.

    A player that ends, or takes more than `limit` seconds to start or to warm up, is left out from then on. What it
    wrote is in `folder`, as NAME.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for player in players:
            told = {"folder": str(folder), "name": player.name, "windows": asdict(player.windows)}
            with (folder / f"{player.name}.log").open("wb") as log:
                processes[player.name] = subprocess.Popen(
                    player.command, env={**player.environment, _VARIABLE: json.dumps(told)}, stdout=log, stderr=log
                )

        def go(player: Player, what: str) -> None:
            (folder / f"{player.name}.{what}.go").touch()

        def figures(player: Player, what: str) -> dict[str, Any] | None:
            if player.name not in processes:
                return None
            place, until = folder / f"{player.name}.{what}.done", time.monotonic() + limit
            while not place.exists():
                if processes[player.name].poll() is not None or time.monotonic() > until:
                    _end(processes.pop(player.name))
                    return None
                time.sleep(_PAUSE)
            return dict(json.loads(place.read_text(encoding="utf-8")))

        for player in players:
            if not player.waits:
                go(player, "load")
        before: Player | None = None
        for player in players:
            go(player, "load")
            figures(player, "ready")
            if before is not None:
                figures(before, "warm-up")
            go(player, "warm-up")
            before = player
        if before is not None:
            figures(before, "warm-up")
        for index in range(max(player.windows.count for player in players)):
            for player in players:
                if index < player.windows.count:
                    go(player, f"window {index}")
                    found = figures(player, f"window {index}")
                    if found is not None:
                        yield player.name, found
    finally:
        for process in processes.values():
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _train(turn: Turn, stage: Callable[[str], int]) -> int:
    """The job's training stage, with a trainer that takes turns."""
    from job.model.startup import import_bitsandbytes_uncompiled

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the stage sets it, before torch
    import_bitsandbytes_uncompiled()
    import job.stages.train as module

    class Trainer(module.AdapterTrainer):
        def __init__(self, *args: Any, callbacks: list[Any], **named: Any) -> None:
            super().__init__(*args, callbacks=[*callbacks, turn.callback()], **named)

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")  # where there is padding
            turn.count(inputs["input_ids"].numel() if mask is None else int(mask.sum()))
            return super().training_step(model, inputs, *rest, **named)

    module.AdapterTrainer = Trainer  # type: ignore[misc]
    turn.await_("load")
    return stage("train")


if __name__ == "__main__":
    from job.stages.__main__ import main

    own = Turn.of_environment()
    assert own is not None, f"started by benchmarks.training_speed, which sets {_VARIABLE}"
    sys.exit(_train(own, main))
