"""One stage's process, as the supervisor sees it: start it, read its events, kill it, and explain its failure."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.checkpoints.kernels import cache_dir
from job.errors import ExitCode, InputError, JobError, KernelsFault, MemoryFull, NodeError, Retry, from_code
from job.guard.escape import for_line
from job.guard.secrets import masked, secret_values, visible_to
from job.nodes.rendezvous import Rendezvous
from job.paths import WITHOUT_WEIGHTS
from job.report.events import EVENTS_FD, LARGEST_EVENT, parse
from job.run import Run, read_json
from job.stages import Stage
from job.stages.turn import STARTED_EARLY

# What torchrun tells its processes. Ours learn it from our own torchrun, not from one that started the container.
_TORCHRUN_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
# Failures after which the supervisor starts the stage in another way
_OTHERWISE = {kind.__name__: kind for kind in (MemoryFull, KernelsFault)}
_POLL_SECONDS = 0.2  # between looks at whether the process is still there
_LONGEST_LINE = 1 << 20
_BYTES_OF_A_SECOND = 1 << 20  # of transfer that count as a second of work
_LARGEST_MESSAGE = 4 * LARGEST_EVENT
_JOB_BEGAN = float(os.environ.get("JOB_BEGAN") or time.time())
_CODE_DIR = str(Path(__file__).parent.parent.parent)  # the job may be started from any folder


@dataclass(frozen=True)
class Launch:
    """How training is started: where its nodes meet, and what earlier failed starts have taught."""

    rendezvous: Rendezvous | None = None
    plan_steps_down: int = 0  # how many plans, from the fastest down, have run out of memory
    kernels: bool = True  # whether the job's own kernels may be used


class StageProcess:
    """`python -m job.stages NAME` in its own session, so that a terminal's Ctrl-C reaches only the supervisor."""

    def __init__(self, run: Run, stage: Stage, launch: Launch | None = None, *, early: bool = False) -> None:
        self._run, self.stage = run, stage
        self._log_file = run.paths.log_file(stage.name)
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self.last_lines: deque[str] = deque(maxlen=20)
        self._said: list[dict[str, Any]] = []
        for stale in self._error_files():
            stale.unlink()
        self._events, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "job.stages", stage.name],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=_environment(stage, launch or Launch())
                | {"TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(run.paths.inductor_dir))}
                | {"TRITON_CACHE_DIR": str(cache_dir(run)), STARTED_EARLY: str(int(early))}
                | {EVENTS_FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def events(self) -> Iterator[dict[str, Any]]:
        """What the stage reports, until it exits.

        What its libraries print goes to the stage's log file and becomes events of level debug, with secrets masked.
        """
        secrets = secret_values()
        with self._log_file.open("a", encoding="utf-8") as log:
            for printed, event in self._heard():
                if printed is not None:
                    plain = for_line(masked(printed.rstrip("\r\n").rsplit("\r", 1)[-1], secrets))  # a bar's last state
                    log.write(f"{plain}\n")
                    log.flush()
                    self.last_lines.append(plain)
                    yield {"event": "message", "level": "debug", "text": plain}
                if event is not None and event["event"] == "failed":
                    self._said.append(event)
                elif event is not None:
                    yield event

    def _heard(self) -> Iterator[tuple[str | None, dict[str, Any] | None]]:
        """Lines that the stage printed and events that it reported, as they come, until it has exited.

        Its exit ends this, not the end of its output: what it left behind may hold that open for ever. So the rest of
        its process group is killed, and what was written until then is read.
        """
        out = self._process.stdout
        assert out is not None
        unfinished = b""
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            selector.register(self._events, selectors.EVENT_READ)
            exited = False
            while selector.get_map():
                ready = [key.fileobj for key, _ in selector.select(0 if exited else _POLL_SECONDS)]
                if exited and not ready:
                    break
                if self._events in ready:
                    data = self._events.recv(_LARGEST_MESSAGE)
                    if not data:
                        selector.unregister(self._events)
                    elif (event := parse(data)) is not None:
                        yield None, event
                if out in ready:
                    data = os.read(out.fileno(), 1 << 16)
                    if not data:
                        selector.unregister(out)
                    *lines, unfinished = (unfinished + data).split(b"\n")
                    if len(unfinished) > _LONGEST_LINE:
                        lines, unfinished = [*lines, unfinished], b""
                    for line in lines:
                        yield line.decode("utf-8", "replace"), None
                if not exited and self._process.poll() is not None:
                    exited = True
                    self._kill_group()
        self._process.wait()
        if unfinished:
            yield unfinished.decode("utf-8", "replace"), None

    def activity(self) -> float:
        """How much its processes have done: CPU seconds and bytes read and written, on a scale on which any use counts.

        For a stage that waits on a network that never answers, this stays where it is.
        """
        return _activity_of(self._process.pid)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """The exit status. For a process killed by a signal, the signal's number, negative."""
        return self._process.wait()

    def kill(self) -> None:
        """Kill the stage immediately, with its ranks and workers."""
        if self.is_running():
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def why(self, code: int) -> JobError:
        """The error that ended the stage: what a rank reported, or else what the exit status says."""
        written = [*(read_json(path) for path in self._error_files()), *self._said]
        # One rank's failure makes others stop (75) or breaks their communication (70), so its own report comes first.
        # The launcher's report of a killed process comes before the other ranks' complaints about its silence.
        order = {ExitCode.TRY_AGAIN: 2, ExitCode.BUG: 1}
        written.sort(key=lambda item: (order.get(item["exit_code"], 0), not item.get("launcher", False)))
        if written:
            first = written[0]
            if (kind := _OTHERWISE.get(first.get("kind"))) is not None:
                return kind(first["message"], first["hint"])
            return from_code(first["exit_code"], first["message"], first["hint"], first.get("retry"))
        hint = f"Its output is in {self._log_file}."
        if code >= 0:
            return JobError(f"Stage {self.stage.name} ended with exit code {code}.", hint)
        ended = f"Stage {self.stage.name} was killed by {signal.Signals(-code).name}."
        if -code in (signal.SIGVTALRM, signal.SIGSEGV, signal.SIGXCPU) and self.stage.name in ("download", "prepare"):
            return InputError(
                f"{ended} A file of the model or the dataset asks for more than any real one does.",
                f"Use another one if you do not trust its author. {hint}",
            )
        if -code in (signal.SIGKILL, signal.SIGBUS, signal.SIGTERM):
            return NodeError(
                f"{ended} The kernel does this when the machine's memory, or /dev/shm, runs out.",
                f"Ask for more memory (--mem, the pod's limit, docker's --shm-size). {hint}",
                retry=Retry.ANYWHERE,  # the job asked for too little, which no other machine changes
            )
        return JobError(ended, hint)

    def _error_files(self) -> list[Path]:
        return sorted(self._run.paths.error_file(self.stage.name, 0).parent.glob(f"{self.stage.name}-rank*.json"))


def _activity_of(group: int) -> float:
    """The same for a process group (proc(5)). Processes that have ended no longer count."""
    ticks, transferred = 0, 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile, or is not ours to read
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[2]) != group:
                continue
            ticks += int(fields[11]) + int(fields[12])
            counters = dict(line.split(": ") for line in (folder / "io").read_text(encoding="ascii").splitlines())
            transferred += int(counters["rchar"]) + int(counters["wchar"])
    return ticks / os.sysconf("SC_CLK_TCK") + transferred / _BYTES_OF_A_SECOND


def _environment(stage: Stage, launch: Launch) -> dict[str, str]:
    """Our environment, without the secrets that the stage does not need, and with quiet libraries."""
    environment = {
        name: value for name, value in visible_to(os.environ, stage.secrets).items() if name not in _TORCHRUN_VARIABLES
    }
    if launch.rendezvous is not None:
        environment |= {
            "JOB_RDZV_ENDPOINT": launch.rendezvous.endpoint,
            "JOB_RDZV_ID": launch.rendezvous.id,
            "JOB_RDZV_PROCESSES": ",".join(map(str, launch.rendezvous.processes)),
        }
    environment |= {
        "JOB_PARENT_PID": str(os.getpid()),
        "JOB_BEGAN": str(_JOB_BEGAN),
        "JOB_STAGE_BEGAN": str(time.time()),
        "JOB_PLAN_STEPS_DOWN": str(launch.plan_steps_down),
        "JOB_COMPUTE_DTYPE": os.environ.get("JOB_COMPUTE_DTYPE", ""),
        "JOB_TRAIN_ON": os.environ.get("JOB_TRAIN_ON", ""),
        WITHOUT_WEIGHTS: os.environ.get(WITHOUT_WEIGHTS, ""),
        "JOB_WITHOUT_KERNELS": str(int(not launch.kernels)),
        "PYTHONPATH": os.pathsep.join(filter(None, [_CODE_DIR, os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",  # a folder `job` in the user's working directory is not this package
        "PYTHONUNBUFFERED": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "warning"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get(
            "TOKENIZERS_PARALLELISM", "true" if stage.name == "prepare" else "false"
        ),
    }
    if not stage.online:  # a stage that has its files must not ask the network for more
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return environment
