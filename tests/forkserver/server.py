"""Imports the libraries of all stages, then forks a process for every client that asks. See `tests/forkserver`."""

from __future__ import annotations

import array
import contextlib
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

# What the stages import; a module that is missing here only makes a test slower.
_LIBRARIES = (
    "torch", "numpy", "pyarrow", "pandas", "datasets", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto", "transformers.trainer", "transformers.integrations.bitsandbytes", "transformers.generation",
    "tokenizers", "safetensors.torch", "bitsandbytes", "peft", "peft.tuners.lora", "accelerate", "trl", "trl.trainer.sft_trainer",
    "trl.trainer.utils", "torch.nn.attention.varlen", "torch.distributed.elastic.multiprocessing.errors", "torch.distributed.launcher.api",
    "torch.utils.tensorboard", "matplotlib.pyplot", "boto3", "rich.progress", "pydantic_settings", "dotenv", "prometheus_client",
    "huggingface_hub", "triton", "sentencepiece", "torch._dynamo",
)  # fmt: skip


def serve(file: str, client: str, owner: int) -> dict[str, Any] | None:
    """Fork for every request; returns the request in the fork, None in the server when its owner is gone."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(file + ".new")
    listener.listen(64)
    os.rename(file + ".new", file)  # from now on clients wait for the imports
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.collect()
    gc.freeze()
    clients: dict[int, socket.socket] = {}  # by the fork's process id
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector.register(woken, selectors.EVENT_READ)
    while _is_alive(owner):
        for key, _ in selector.select(timeout=2):
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request = _receive(connection)
                if request is None:
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    for other in (listener, connection, *clients.values()):
                        other.close()
                    selector.close()
                    _become(request, client)
                    return request
                for stream in request["streams"]:
                    os.close(stream)
                clients[pid] = connection
                with (Path(file).parent / "forks").open("a", encoding="utf-8") as count:
                    count.write(f"{request['arguments'][-1]}\n")
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj == woken:
                os.read(woken, 4096)
            elif key.data in clients:  # the client is gone: so must be what it stands for
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)
        _reap(clients, selector)
    for pid in clients:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(Path(file).parent, ignore_errors=True)
    return None


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(4 * 4))
    if len(head) < 4 or not ancillary:
        return None
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    length, data = int.from_bytes(head, "big"), b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            return None
        data += part
    return {**json.loads(data), "streams": list(streams)}


def _become(request: dict[str, Any], client: str) -> None:
    """Turn this fork into the process that was asked for, as far as Python allows."""
    os.setsid()
    os.umask(request["umask"])
    standard, events = request["streams"][:3], request["streams"][3:]
    for number, stream in enumerate(standard):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ["JOB_PARENT_PID"] = str(os.getppid())
    if events:
        os.environ["JOB_EVENTS_FD"] = str(events[0])
        os.set_inheritable(events[0], True)
    os.chdir(request["cwd"])
    sys.executable = client
    sys.orig_argv = [client, *request["arguments"]]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    own = str(Path(__file__).parent / "site")
    for path in paths:
        other = Path(path) / "sitecustomize.py"
        if path != own and other.is_file():  # a test's, which Python would import at its start
            runpy.run_path(str(other))
            break


def _reap(clients: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    for pid in list(clients):
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            continue
        connection = clients.pop(pid)
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(connection)
        with contextlib.suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        connection.close()
        with contextlib.suppress(ProcessLookupError):  # what it left behind, such as data workers
            os.killpg(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    asked = serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    if asked is not None:
        sys.argv = ["job.stages", *asked["arguments"][2:]]
        runpy.run_module("job.stages", run_name="__main__", alter_sys=True)
