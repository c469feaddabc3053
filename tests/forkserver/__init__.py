"""Stages' processes forked from one that has imported the libraries: importing them takes longer than a tiny training.

Every test of a whole job starts several processes that each spend about ten seconds of CPU time on importing torch,
transformers and trl. Here a server imports them once. In place of Python the supervisor (and torchrun) starts a small
client, which asks the server to fork, lends it its standard streams, and exits as the fork exits. When the client dies,
the server kills the fork with everything below it, so a kill, an exit code and a lost parent mean what they mean outside
the tests.

The job knows nothing of this: `site/sitecustomize.py` names the client as `sys.executable` in the supervisor. Tests
that signal or list real processes start them without it (`Job(forks=False)`).
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.forkserver.client import key_of

SITE = Path(__file__).parent / "site"
DIRECTORY = "JOB_TEST_FORKSERVERS"  # the variable that names the folder of the servers' sockets
_CLIENT = Path(__file__).parent / "client.py"
_SERVER = Path(__file__).parent / "server.py"


def start(folder: Path, environments: list[dict[str, str]], owner: int) -> None:
    """Start a server for each of these environments, unless another worker of this test session has done so.

    They exit after process `owner` does.
    """
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = folder / "python"
        for environment in environments:
            socket_file = folder / f"{key_of(environment)}.sock"
            started = socket_file.with_suffix(".started")
            if started.exists():
                continue
            started.touch()
            subprocess.Popen(
                [sys.executable, str(_SERVER), str(socket_file), str(client), str(owner)],
                env={name: value for name, value in environment.items() if name != DIRECTORY},
                stdin=subprocess.DEVNULL,
                stdout=(folder / "log").open("a"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if client.exists():
            return
        text = _CLIENT.read_text(encoding="utf-8").replace("@PYTHON@", sys.executable)
        client.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{text}", encoding="utf-8")
        client.chmod(0o755)
