"""Cut the power: an ext4 file system on a loop device loses everything that was not made durable, at random moments.

    python -m tests.torture.power --losses 60 --seed 1      (root)

EXT4_IOC_SHUTDOWN stops the file system at once, as a power cut does, either after its journal was flushed or without.
The mount options leave nothing to luck: no flush on rename, and a journal that is committed every five minutes. After
each loss the job is killed, the file system is mounted again, and the job is started again. One loss more follows right
after it has exited with 0. Every run must end with the right model, and no commit and no "complete" may be wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.conftest import make_tiny_model, serve_s3
from tests.fake_hub import FakeHub
from tests.fault_proxy import FaultProxy
from tests.torture.points import STAGES, Point
from tests.torture.run import World, build_faults
from tests.torture.scenarios import SCENARIOS
from tests.torture.tally import Tally
from tests.torture.trial import Trial, torture

_EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), fs/ext4/ext4.h
_MODES = {"journal flushed": 1, "journal not flushed": 2}
_LOSSES_OF_A_RUN = 7
_WANTED = ("folder", "sources on S3", "from the Hub to the Hub")


class Disk:
    """A file system whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self._image, self.place = folder / "disk.img", folder / "disk"
        self.place.mkdir()

    def make(self) -> None:
        self.unmount()
        with self._image.open("wb") as image:
            image.truncate(1 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True)
        self.mount()

    def mount(self) -> None:
        options = "loop,noauto_da_alloc,commit=300"
        subprocess.run(["mount", "-t", "ext4", "-o", options, self._image, self.place], check=True)

    def unmount(self) -> None:
        for _ in range(100):  # until the killed processes have closed their files
            if subprocess.run(["umount", self.place], capture_output=True, check=False).returncode == 0:
                return
            if not os.path.ismount(self.place):
                return
            time.sleep(0.1)
        subprocess.run(["umount", "--lazy", self.place], check=True)

    def cut_power(self, mode: str) -> None:
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _MODES[mode]))
        finally:
            os.close(descriptor)


class PoweredTrial(Trial):
    """A run on a disk whose power is cut."""

    def __init__(self, *arguments: Any, disk: Disk) -> None:
        super().__init__(*arguments)
        self.disk, self.mode = disk, "journal flushed"

    def _act(self, process: subprocess.Popen[str], act: str, choice: float) -> None:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                self.disk.cut_power(self.mode)
            process.send_signal(signal.SIGKILL)
            self.disturbed = "power"

    def come_back(self) -> None:
        """Mount the disk again, as after a boot."""
        self.disk.unmount()
        self.disk.mount()


def lose_power(trial: PoweredTrial, seed: int, expected: dict[str, Any], tally: Tally) -> None:
    """Cut the power of a run several times, and once more when it is complete."""
    chance, name = random.Random(seed), trial.scenario.name
    stages = sorted(chance.choices((*STAGES, "train", "publish"), k=_LOSSES_OF_A_RUN), key=STAGES.index)
    for stage in stages:
        if stage in trial.complete and stage not in ("preflight", "download", "prepare", "merge"):
            continue
        trial.mode = chance.choice(list(_MODES))
        code = trial.live(Point(f"{stage}, {trial.mode}", stage), chance)
        if trial.disturbed == "power":
            tally.killed(name, f"{stage}, {trial.mode}")
        trial.come_back()
        trial.audit()
        if code == 0 and not trial.disturbed:
            break
    for trial.mode in _MODES:
        code = trial.live(None, chance)
        if code != 0:
            tally.complain(f"{trial.folder.name}, {name}: ends with {code} after the losses")
            return
        trial.disk.cut_power(trial.mode)
        tally.killed(name, f"after exit 0, {trial.mode}")
        trial.come_back()
        trial.audit()
    code = trial.live(None, chance)
    found = trial.outcome() if code == 0 else {"exit code": code}
    differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    tally.count(name, "runs")
    tally.count(name, "equal", int(not differing))
    if differing:
        tally.complain(f"{trial.folder.name}, {name}: differs from the undisturbed run: {', '.join(differing)}")


@contextlib.contextmanager
def _watchdog(disk: Disk) -> Iterator[None]:
    try:
        yield
    finally:
        disk.unmount()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, tally = time.monotonic(), Tally(wanted=arguments.losses, until=time.monotonic() + 36_000)
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in _WANTED]
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="power-")))
        disk = Disk(top)
        stack.enter_context(_watchdog(disk))
        (top / "s3").mkdir()
        world = World(
            top=top, model=make_tiny_model(top / "model"), faults=build_faults(top),
            s3=stack.enter_context(serve_s3(top / "s3")), hub=stack.enter_context(FakeHub()), hf_home=disk.place / "hf-home",
        )  # fmt: skip
        world.prepare(scenarios)
        expected: dict[str, dict[str, Any]] = {}
        number = 0
        while not tally.over():
            scenario = scenarios[number % len(scenarios)]
            disk.make()
            proxy = stack.enter_context(FaultProxy(world.s3)) if scenario.store == "s3" else None
            if scenario.name not in expected:
                expected[scenario.name] = torture(
                    Trial(world, scenario, _folder(disk.place, f"plain-{number}"), tally, proxy), 0, 0, None
                )
                disk.make()
            trial = PoweredTrial(world, scenario, _folder(disk.place, f"run-{number}"), tally, proxy, disk=disk)
            lose_power(trial, arguments.seed * 1000 + number, expected[scenario.name], tally)
            print(f"run {number}, {scenario.name}: {sum(tally.kills.values())} of {arguments.losses}", flush=True)
            number += 1
    for where, count in sorted(tally.kills.items()):
        print(f"  {where}: {count}")
    print("\n".join(tally.complaints))
    runs = sum(counts["runs"] for counts in tally.by_scenario.values())
    equal = sum(counts["equal"] for counts in tally.by_scenario.values())
    good = runs == equal and not tally.complaints
    print(
        f"seed {arguments.seed}: power lost {sum(tally.kills.values())} times in {runs} runs, {tally.damaged_commits} corrupt "
        f"commits, {tally.hangs} hangs, final hashes equal in {equal} of {runs} runs, {time.monotonic() - began:.0f} s: "
        f"{'PASSED' if good else 'FAILED'}"
    )
    return 0 if good else 1


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


if __name__ == "__main__":
    sys.exit(main())
