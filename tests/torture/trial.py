"""One tortured run: as many starts as it takes, each disturbed, and the outcome compared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from job.checkpoints.lease import LeaseRecord
from job.checkpoints.manifest import MANIFEST, Manifest, Rejected, restore
from job.storage import Store, open_store
from tests.conftest import ROOT
from tests.fault_proxy import FaultProxy
from tests.torture.points import STAGES, Point
from tests.torture.run import RUN_ID, World, repository_of
from tests.torture.scenarios import Scenario
from tests.torture.tally import Tally

_FAULT_RATE = 0.05
_IO_RATE = 1500  # of a million writes
_LIFE_SECONDS = 240.0  # a start that takes longer has hung
_JUMP_SECONDS = 600
_FINE = {0, 75, -signal.SIGKILL}
_SECONDS_OF_A_STAGE = {
    "preflight": 1.0,
    "download": 1.0,
    "prepare": 2.0,
    "train": 6.0,
    "sample": 3.0,
    "merge": 2.0,
    "publish": 1.0,
}


class Trial:
    """One run of the job in its own folder, with as many starts as it takes."""

    def __init__(
        self, world: World, scenario: Scenario, folder: Path, tally: Tally, proxy: FaultProxy | None = None
    ) -> None:
        self.world, self.scenario, self.folder, self.tally, self.proxy = world, scenario, folder, tally, proxy
        self.environment = world.environment(scenario, folder)
        self.store_url = f"s3://bucket/{folder.name}" if proxy else str(folder / "store")
        self.environment["FT_STORE_URL"] = self.store_url
        if proxy:
            self.environment["AWS_ENDPOINT_URL"] = proxy.url
        self.complete: set[str] = set()
        self.stage, self.last_step = "preflight", 0
        self.disturbed = ""  # what was done to the start that is running

    def live(self, point: Point | None, chance: random.Random) -> int:
        """Start the job, which ends by itself or at `point`. Returns its exit code, -9 if it was killed there."""
        environment, self.disturbed = dict(self.environment), ""
        if point is not None and point.event:
            skip = chance.randint(0, point.skips)
            environment["TORTURE_POINT"] = json.dumps(
                {"process": point.process, "event": point.event, "match": point.match, "skip": skip}
            )
        if point is not None and self.scenario.disturbance == "disk":
            environment["TORTURE_IO"] = f"{_IO_RATE} {self.folder}"
        if self.scenario.disturbance == "clock":
            jumps = [chance.choice((-_JUMP_SECONDS, 0, _JUMP_SECONDS)) for _ in range(2)]
            environment["TORTURE_CLOCK"] = f"{jumps[0]} {jumps[1]} {time.time() + chance.uniform(2, 12):.3f}"
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )
        limit = threading.Timer(_LIFE_SECONDS, self._hung, (process,))
        limit.start()
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self._follow(json.loads(line), process, point, chance)
        errors = process.stderr.read()
        code = process.wait()
        limit.cancel()
        tolerated = _FINE | ({69} if self.disturbed == "child" or self.scenario.disturbance == "disk" else set())
        if code not in tolerated:
            self._complain(f"exit code {code} after {point.name if point else 'no kill'}: {errors[-1500:]}")
        return code

    def _hung(self, process: subprocess.Popen[str]) -> None:
        self.tally.hangs += 1
        self._complain(f"a start hung in stage {self.stage}")
        process.kill()

    def _follow(
        self, event: dict[str, Any], process: subprocess.Popen[str], point: Point | None, chance: random.Random
    ) -> None:
        match event:
            case {"event": "stage_started", "stage": stage}:
                self.stage = stage
                if point and not point.event and stage == point.stage:
                    moment = chance.uniform(0, _SECONDS_OF_A_STAGE[stage])
                    threading.Timer(moment, self._act, (process, point.act, chance.random())).start()
            case {"event": "stage_ended", "stage": stage, "result": "done"}:
                self.complete.add(stage)
            case {"event": "progress", "stage": "train", "done": done}:
                self.last_step = int(done)
            case {"message": str(text), "step": step} if text.startswith("Resuming from"):
                self.tally.resumed(self.scenario.name, self.last_step - int(step))

    def _act(self, process: subprocess.Popen[str], act: str, choice: float) -> None:
        """What happens to the start at a random moment. The stages' processes die with the supervisor."""
        if process.poll() is not None:
            return
        if act == "child":
            children = _below(process.pid)
            if not children:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(children[int(choice * len(children))], signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM if act == "stop" else signal.SIGKILL)
        self.disturbed = act

    def replace_machine(self) -> None:
        """The next start is on another machine, which has the store alone."""
        shutil.rmtree(self.folder / "results", ignore_errors=True)
        self.complete -= {"download", "prepare", "merge"}

    def audit(self) -> None:
        """Check that every commit that counts is intact. It must be at any moment."""
        store = self.open_store()
        try:
            record = LeaseRecord(**json.loads(store.get(f"{RUN_ID}/lease.json")))
        except FileNotFoundError:
            return
        for key, _ in list(store.list(RUN_ID)):
            folder = key.removeprefix(f"{RUN_ID}/").removesuffix(f"/{MANIFEST}")
            if not key.endswith(MANIFEST) or not _counts(folder, record):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    restore(store, f"{RUN_ID}/{folder}", Path(scratch) / "it")
                except Rejected as reason:
                    self._complain(f"a commit that counts is damaged: {reason}")
                    self.tally.damaged_commits += 1

    def open_store(self) -> Store:
        """The store, without the proxy's faults."""
        return open_store(self.store_url)

    def outcome(self) -> dict[str, Any]:
        """What must not depend on how often the run was killed: hashes of all it produced, and the loss curve."""
        store, found = self.open_store(), {}
        with tempfile.TemporaryDirectory() as scratch:
            folders = {key.removesuffix(f"/{MANIFEST}") for key, _ in store.list(RUN_ID) if key.endswith(MANIFEST)}
            checkpoints = sorted(folder for folder in folders if "/checkpoints/" in folder)
            places = {"train": max(folder for folder in folders if "stages/train" in folder)}
            if self.environment["FT_SAVE_STEPS"] == "3":  # otherwise when the last one is saved depends on the clock
                places["checkpoint"] = checkpoints[-1]
            for label, prefix in places.items():
                restore(store, prefix, Path(scratch) / label)
            for path in Path(scratch).rglob("*.safetensors"):
                found[path.relative_to(scratch).as_posix()] = _hash(path.read_bytes())
            state = json.loads((Path(scratch) / "train" / "trainer_state.json").read_bytes())
            metrics = json.loads((Path(scratch) / "train" / "metrics.json").read_bytes())
        clock = ("runtime", "per_second", "total_flos")
        found["steps"] = state["global_step"]
        found["loss curve"] = [
            {name: value for name, value in entry.items() if not any(part in name for part in clock)}
            for entry in state["log_history"]
        ]
        found["order of rows"] = metrics["row_order_sha256"]
        return found | {f"published/{name}": _hash(data) for name, data in self._published().items()}

    def _published(self) -> dict[str, bytes]:
        if self.scenario.sources == "hub":
            name = repository_of(self.folder)
            files = self.world.hub.files(f"models/{name}")
            return {file: data.replace(name.encode(), b"REPOSITORY") for file, data in files.items()}
        folder = self.folder / "results" / "published" / "tortured"
        if folder.is_dir():
            return {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
        store = self.open_store()
        keys = [key for key, _ in store.list(f"{RUN_ID}/published") if not key.endswith(MANIFEST)]
        return {key.removeprefix(f"{RUN_ID}/published/"): store.get(key) for key in keys}

    def _complain(self, text: str) -> None:
        self.tally.complain(f"{self.folder.name}, {self.scenario.name}: {text}")


def torture(
    trial: Trial, kills: int, seed: int, expected: dict[str, Any] | None, control: str | None = None
) -> dict[str, Any]:
    """Disturb the run up to `kills` times, let it finish, and compare the outcome. Without `expected`, nothing is counted."""
    chance, name, tally = random.Random(seed), trial.scenario.name, trial.tally
    if trial.proxy and expected is not None:
        trial.proxy.rate = _FAULT_RATE
    plan = sorted(chance.choices(trial.scenario.points, k=kills), key=lambda point: STAGES.index(point.stage))
    while plan and not tally.over():
        point = plan.pop(0)
        if point.stage in trial.complete:
            continue
        code = trial.live(point, chance)
        if code == -signal.SIGKILL or trial.disturbed:
            tally.killed(name, point.name)
        elif code in (69, 75):
            tally.count(name, "ended")
        elif code == 0:
            break
        trial.audit()
        if trial.scenario.store == "elsewhere":
            trial.replace_machine()
        if control:
            _tamper(trial, control)
    for _ in range(8):
        code = trial.live(None, chance)
        if code == 0:
            break
        if expected is not None:
            tally.count(name, "ended")
        if trial.proxy:
            trial.proxy.rate /= 2  # a store that fails forever does not test resuming
    found = trial.outcome() if code == 0 else {"exit code": code}
    if expected is not None:
        tally.count(name, "runs")
        differing = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        tally.count(name, "equal", int(not differing))
        if differing:
            tally.complain(f"{trial.folder.name}, {name}: differs from the undisturbed run: {', '.join(differing)}")
        if trial.proxy:
            with tally.lock:
                tally.faults += trial.proxy.injected
    elif code != 0:
        tally.complain(f"{name}: the undisturbed run ends with {code}")
    return found


def _tamper(trial: Trial, control: str) -> None:
    """Simulate a resume that forgets the generators or the position in the data."""
    import torch

    from job.training.state import load_tree, save_tree

    shutil.rmtree(trial.folder / "results" / "runs" / RUN_ID / "checkpoints", ignore_errors=True)
    manifests = sorted(Path(trial.store_url).glob(f"{RUN_ID}/checkpoints/*/*/{MANIFEST}"))
    if not manifests:
        return
    folder = manifests[-1].parent
    state = load_tree(folder / "process-0.safetensors")
    other = torch.Generator().manual_seed(7).get_state()
    if control == "rng":
        state["generators"]["torch"] = other
    else:
        state["data_order"] |= {"batches": 0, "generator": other}
    save_tree(state, folder / "process-0.safetensors")
    fingerprint = json.loads(manifests[-1].read_bytes())["fingerprint"]
    manifests[-1].write_bytes(Manifest.of(folder, fingerprint).to_bytes())


def _below(pid: int) -> list[int]:
    """All descendants of a process."""
    found = [pid]
    for parent in found:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, listing.read_text(encoding="ascii").split())
    return found[1:]


def _counts(folder: str, record: LeaseRecord) -> bool:
    return folder in record.inherited or folder.endswith(f"/attempt-{record.attempt:04d}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
