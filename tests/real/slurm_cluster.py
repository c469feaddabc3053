"""A real two-node Slurm on this machine: munge, slurmctld and two slurmd on free ports, in their own folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, free_port

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
KillWait=8
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=8 RealMemory=8000 Gres=gpu:h200:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=8000 Gres=gpu:h200:2
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1 GraceTime=25 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
"""
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


@dataclass
class Slurm:
    """The cluster as a user sees it."""

    folder: Path
    environment: dict[str, str]

    def command(self, *arguments: str, **environment: str) -> str:
        result = subprocess.run(
            arguments,
            env={**self.environment, **environment},
            cwd=self.folder / "checkout",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return result.stdout.strip()

    def submit(self, *options: str, settings: dict[str, str], script: str = "slurm/train.sh") -> str:
        return self.command("sbatch", "--parsable", *options, script, **settings).split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """The output of `scontrol show job`."""
        words = self.command("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_end(self, job: str, seconds: float = 420) -> dict[str, str]:
        """The facts about the job once it has ended for good."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            facts = self.facts(job)
            if facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return facts
            time.sleep(1)
        raise AssertionError(f"job {job} did not end: {facts}\n{self.log(job)}")

    def await_log(self, job: str, text: str, times: int = 1, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while self.log(job).count(text) < times:
            assert time.monotonic() < deadline, f"{text!r} is not in the log of {job}:\n{self.log(job)}"
            time.sleep(0.2)

    def log(self, job: str) -> str:
        file = self.folder / "checkout" / f"finetune-{job}.log"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def start_node(self, name: str) -> None:
        subprocess.run(["slurmd", "-N", name, "-f", self.environment["SLURM_CONF"]], env=self.environment, check=True)

    def kill_node(self, name: str) -> None:
        """Make the node vanish: its daemon and everything that runs on it, at once."""
        pid = int((self.folder / f"slurmd.{name}.pid").read_text(encoding="ascii"))
        os.kill(pid, signal.SIGKILL)  # so that it cannot report what follows
        mine = [process for process in Path("/proc").glob("[0-9]*") if self._runs_on(process, name)]
        watchers = {line.split()[1] for process in mine for line in _status(process) if line.startswith("PPid")}
        mine += [Path("/proc") / watcher for watcher in watchers if _name(watcher) == "slurmstepd"]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none of them may see another die and report it
            for process in mine:
                with contextlib.suppress(OSError):
                    os.kill(int(process.name), number)

    def _runs_on(self, process: Path, name: str) -> bool:
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            return False
        wanted = (f"SLURMD_NODENAME={name}", f"SLURM_CONF={self.environment['SLURM_CONF']}")
        return all(variable.encode() in variables for variable in wanted)


def _name(pid: str) -> str:
    try:
        return (Path("/proc") / pid / "comm").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _status(process: Path) -> list[str]:
    try:
        return (process / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, wait until both nodes are idle, and stop everything afterwards."""
    folder.chmod(0o755)
    for name in ("state", "spool.node1", "spool.node2", "dev"):
        (folder / name).mkdir()
    for index in range(2):
        os.mknod(folder / "dev" / f"nvidia{index}", 0o600 | 0o020000, os.makedev(1, 3))
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            host=socket.gethostname(), folder=folder, controller_port=free_port(), ports=(free_port(), free_port())
        ),
        encoding="utf-8",
    )
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName=node[1-2] Name=gpu Type=h200 File={folder}/dev/nvidia[0-1]\n", encoding="utf-8"
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FT_", "SLURM_"))}
    environment = {**inherited, "SLURM_CONF": str(configuration)}
    munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
    subprocess.run(
        ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock", *munge], check=True, env=environment
    )
    _check_out(folder / "checkout")
    cluster = Slurm(folder, environment)
    try:
        subprocess.run(["slurmctld", "-c", "-f", str(configuration)], env=environment, check=True)
        for name in ("node1", "node2"):
            cluster.start_node(name)
        deadline = time.monotonic() + 60
        while cluster.command("sinfo", "--noheader", "--partition=gpu", "--format=%T %D") != "idle 2":
            assert time.monotonic() < deadline, cluster.command("sinfo")
            time.sleep(0.2)
        yield cluster
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, timeout=60)
        time.sleep(1)
        for name in ("slurmd.node1", "slurmd.node2", "slurmctld", "munge"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text(encoding="ascii")), signal.SIGKILL)


def _check_out(target: Path) -> None:
    """Check out the repository as a cluster user would, with the environment that the tests run in."""
    target.mkdir()
    for name in ("entrypoint.py", "job", "slurm"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    (target / ".venv").symlink_to(Path(sys.prefix))
