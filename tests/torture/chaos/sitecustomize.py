"""Kills this process and its supervisor, by SIGKILL, in the middle of a chosen file operation.

Python imports a module of this name at its start if it finds one on PYTHONPATH. TORTURE_POINT is a JSON object: the
`process` (`supervisor` or a stage), the audit `event` (https://docs.python.org/3/library/audit_events.html), a regular
expression that its arguments must `match`, and how many such events to `skip`. The job knows nothing of it.
"""

import json
import os
import re
import signal
import sys


def _process() -> str:
    arguments = sys.orig_argv
    if "job.stage" in arguments:
        return arguments[-1]
    return "supervisor" if any(argument.endswith("entrypoint.py") for argument in arguments) else "another"


def _arm(point: dict) -> None:
    event, match, left = point["event"], re.compile(point["match"]), [point["skip"]]

    def hook(name: str, arguments: tuple) -> None:
        if name == event and match.search(" ".join(map(str, arguments))):
            if left[0] == 0:
                supervisor = os.environ.get("JOB_SUPERVISOR_PID")
                if supervisor:
                    os.kill(int(supervisor), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


if "TORTURE_POINT" in os.environ:
    _point = json.loads(os.environ["TORTURE_POINT"])
    if _point["process"] == _process():
        _arm(_point)
