"""Runs as `python -m job.stages NAME` would, in a fork of a server that has imported the libraries.

A script of its own, started for every stage: it imports next to nothing. Any other command, or an environment that no
server is for, becomes a real Python.
"""

import array
import os
import signal
import socket
import sys

PYTHON = "@PYTHON@"
PR_SET_PDEATHSIG = 1
# What libraries read from the environment when they are imported: a server serves one combination of values.
READ_AT_IMPORT = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "DATASETS_",
    "TRITON_INTERPRET",
    "OMP_",
    "MKL_",
    "ACCELERATE_",
    "BNB_",
)
ONLINE = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET")  # of no meaning without a network


def key_of(environment):
    """Names the server that can fork a process with this environment."""
    import zlib

    unread = ("HF_TOKEN", *(ONLINE if environment.get("HF_HUB_OFFLINE") == "1" else ()))
    read = sorted(
        f"{name}={value}"
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in unread
    )
    return f"{zlib.crc32(chr(10).join(read).encode()):08x}"


def become_python():
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])


def main():
    file = os.path.join(os.environ.get("JOB_TEST_FORKSERVERS", ""), f"{key_of(os.environ)}.sock")
    arguments = [argument for argument in sys.argv[1:] if argument != "-u"]  # torchrun's
    if arguments[:2] != ["-m", "job.stages"] or not os.path.exists(file):
        become_python()
    parent = os.getppid()
    import ctypes
    import json

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # as a stage does
    os.environ["JOB_TEST_CLIENT_PID"] = str(os.getpid())
    umask = os.umask(0)
    os.umask(umask)
    request = json.dumps(
        {"umask": umask, "arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd()}
    ).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(file)
    streams = array.array("i", [0, 1, 2])
    if "JOB_EVENTS_FD" in os.environ:
        streams.append(int(os.environ["JOB_EVENTS_FD"]))
    server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    server.sendall(request)
    for stream in streams:  # the fork alone must keep them open
        os.close(stream)
    status = server.recv(4)
    if len(status) < 4:
        os._exit(70)
    code = int.from_bytes(status, "big", signed=True)
    if code >= 0:
        os._exit(code)
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


if __name__ == "__main__":
    main()
