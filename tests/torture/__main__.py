"""Kill the job again and again, and check that it ends as if nothing had happened.

    python -m tests.torture --kills 200 --seed 1

Runs the whole job on a tiny model on the CPU, in the kinds of run that `scenarios` lists. Each run is disturbed several
times: killed by SIGKILL at random moments of each stage, and in the middle of chosen file operations (saving, hashing,
uploading, committing, restoring, merging, publishing, taking the lease); a process of a stage killed alone; stopped;
its disk failing, its clock jumping, its machine replaced, its store behind a proxy that injects faults.

At the end the adapter, optimizer, generators, row order, loss curve and everything published must be bit-identical to
those of an uninterrupted run. A start that takes too long has hung. The last line and the exit code say how it went.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.conftest import make_tiny_model, serve_s3
from tests.fake_hub import FakeHub
from tests.fault_proxy import FaultProxy
from tests.torture.run import World, build_faults
from tests.torture.scenarios import SCENARIOS, Scenario
from tests.torture.tally import Tally, report
from tests.torture.trial import Trial, torture

KILLS_OF_A_RUN = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=600, help="stop killing after this long")
    parser.add_argument("--only", default="", help="names of scenarios, separated by semicolons")
    parser.add_argument(
        "--control", choices=("rng", "data"), help="drop this from every checkpoint: the comparison must fail"
    )
    arguments = parser.parse_args()
    wanted = [name.strip() for name in arguments.only.split(";") if name.strip()]
    scenarios = [scenario for scenario in SCENARIOS if not wanted or scenario.name in wanted]
    if not scenarios or len(scenarios) < len(wanted):
        parser.error(f"--only: the scenarios are {'; '.join(scenario.name for scenario in SCENARIOS)}")
    began = time.monotonic()
    tally = Tally(wanted=arguments.kills, until=began + 60 * arguments.minutes)
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-")))
        world = World(
            top=top,
            model=make_tiny_model(top / "model"),
            faults=build_faults(top),
            s3=stack.enter_context(serve_s3(_folder(top, "s3"))),
            hub=stack.enter_context(FakeHub()),
        )
        world.prepare(scenarios)
        expected = _Undisturbed(world, tally)
        numbers = itertools.count()

        def one(number: int) -> None:
            scenario = scenarios[number % len(scenarios)]
            seed = arguments.seed * 10_000 + number
            proxy = stack.enter_context(FaultProxy(world.s3, seed=seed)) if scenario.store == "s3" else None
            undisturbed = expected.of(scenario)
            if "exit code" in undisturbed:
                return
            trial = Trial(world, scenario, _folder(top, f"run-{number}"), tally, proxy)
            torture(trial, KILLS_OF_A_RUN, seed, undisturbed, arguments.control)
            print(f"run {number}, {scenario.name}: {sum(tally.kills.values())} of {arguments.kills}", flush=True)
            shutil.rmtree(trial.folder, ignore_errors=True)

        def work(_: int) -> None:
            while not tally.over():
                one(next(numbers))

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(work, range(arguments.jobs)))
    return report(tally, arguments.seed, time.monotonic() - began)


class _Undisturbed:
    """The outcome of an undisturbed run of each scenario, made when it is first asked for."""

    def __init__(self, world: World, tally: Tally) -> None:
        self._world, self._tally = world, tally
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._locks = {scenario.name: threading.Lock() for scenario in SCENARIOS}

    def of(self, scenario: Scenario) -> dict[str, Any]:
        with self._locks[scenario.name]:
            if scenario.name not in self._outcomes:
                folder = _folder(self._world.top, f"undisturbed-{SCENARIOS.index(scenario)}")
                proxy = FaultProxy(self._world.s3) if scenario.store == "s3" else None
                trial = Trial(self._world, scenario, folder, self._tally, proxy)
                self._outcomes[scenario.name] = torture(trial, 0, 0, None)
            return self._outcomes[scenario.name]


def _folder(top: Path, name: str) -> Path:
    (top / name).mkdir()
    return top / name


if __name__ == "__main__":
    sys.exit(main())
