"""The end of a process: fast, and nothing that was promised is lost."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import atexit, sys, threading, time
from job.leave import leave

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("last words", end="")
sys.stderr.write("last complaint")
leave(69)
"""


def test_threads_end_exit_handlers_run_and_output_is_written_but_no_object_is_taken_apart() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 69
    assert ended.stdout == "last wordsthread\nexit handler\n"
    assert ended.stderr == "last complaint"


def test_an_output_that_nobody_reads_changes_no_exit_code() -> None:
    program = "import sys; from job.leave import leave; sys.stdin.read(); print('buffered'); leave(75)"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=60) == 75
    assert process.stderr.read() == b""
