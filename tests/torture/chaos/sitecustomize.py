"""Kill this process and its supervisor, by SIGKILL, in the middle of a chosen file operation.

Python imports a module of this name at startup if it finds one on PYTHONPATH. TORTURE_POINT is a JSON object: the
`process` (`supervisor` or a stage), the audit `event` (https://docs.python.org/3/library/audit_events.html), a regular
expression that its arguments must `match`, and how many such events to `skip`. The job does not know about it.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path


def _process() -> str:
    arguments = sys.orig_argv
    if "job.stages" in arguments:
        return arguments[-1]
    return "supervisor" if any(argument.endswith("entrypoint.py") for argument in arguments) else "another"


def _supervisor() -> int | None:
    """The ancestor process that runs the entrypoint."""
    pid = int(os.environ.get("JOB_TEST_CLIENT_PID") or os.getppid())
    while pid > 1:
        folder = Path(f"/proc/{pid}")
        if b"entrypoint.py" in (folder / "cmdline").read_bytes():
            return pid
        pid = int((folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    return None


def _arm(point: dict) -> None:
    event, match, left = point["event"], re.compile(point["match"]), [point["skip"]]
    supervisor = _supervisor()

    def hook(name: str, arguments: tuple) -> None:
        if name == event and match.search(" ".join(map(str, arguments))):
            if left[0] == 0:
                if supervisor is not None:
                    os.kill(supervisor, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


if "TORTURE_POINT" in os.environ:
    _point = json.loads(os.environ["TORTURE_POINT"])
    if _point["process"] == _process():
        _arm(_point)
