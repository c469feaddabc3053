"""The model of a finished run answers in the terminal, and the command leaves without a trace."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputError
from tests.conftest import ROOT, Job, published

pytestmark = pytest.mark.xdist_group("uninterrupted")


def talk(job: Job, prompt: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "chat", *flags],
        input=prompt,
        capture_output=True,
        text=True,
        env={**os.environ, **job.environment},
        timeout=120,
    )


def test_one_prompt_from_standard_input_is_answered_as_the_sample_stage_did(uninterrupted: Job) -> None:
    samples = json.loads((published(uninterrupted) / "samples.json").read_text(encoding="utf-8"))
    for flags, key in ((("--adapter",), "tuned"), (("--base",), "base")):
        done = talk(uninterrupted, samples[0]["prompt"] + "\n", *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == samples[0][key] or key == "base"  # the base is not in 4 bits here
    merged = talk(uninterrupted, samples[0]["prompt"])
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.strip()
    assert "Loading" in merged.stderr
    assert talk(uninterrupted, "\n").stdout == ""  # nothing was asked
    latin = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "chat"], input=b"Caf\xe9?", capture_output=True,
        env={**os.environ, **uninterrupted.environment}, timeout=120,
    )  # fmt: skip
    assert latin.returncode == 0, latin.stderr
    long = talk(uninterrupted, "lamp " * 9000)
    assert long.returncode == 65
    assert "tokens, and the model reads" in long.stderr


def test_a_conversation_that_no_longer_fits_forgets_its_beginning(
    make_run: Callable[..., Any], tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from job.commands.chat import _loaded

    run = make_run(
        MODEL_NAME=str(tiny_model), CHAT_TEMPLATE="chatml", SYSTEM_PROMPT="Keep the light.", SAMPLE_MAX_NEW_TOKENS="4"
    )
    answer = _loaded(run, "base", tiny_model)
    most = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    messages: list[dict[str, str]] = []
    for turn in range(12):
        messages.append({"role": "user", "content": f"{turn} " + "q" * (most // 8)})
        messages.append({"role": "assistant", "content": "".join(answer(messages))})
    assert len(messages) < 24
    assert messages[-2]["content"].startswith("11 ")
    assert "no longer fits" in capfd.readouterr().err
    with pytest.raises(InputError, match="tokens, and the model reads"):
        answer([{"role": "user", "content": "q" * most * 4}])


def test_a_run_without_a_model_here_and_flags_elsewhere_are_refused(uninterrupted: Job) -> None:
    uninterrupted.environment["FT_RUN_ID"], before = "another", uninterrupted.environment["FT_RUN_ID"]
    try:
        done = talk(uninterrupted, "Hi")
    finally:
        uninterrupted.environment["FT_RUN_ID"] = before
    assert done.returncode == 78
    assert "no merged model on this machine" in done.stderr
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "plan", "--base"], capture_output=True, text=True
    )
    assert wrong.returncode == 78


def test_in_a_terminal_it_answers_and_leaves_at_ctrl_c_and_at_the_end_of_input(
    uninterrupted: Job, tmp_path: Path
) -> None:
    for leave in ("end", "interrupt"):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "entrypoint.py"), "chat"],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **uninterrupted.environment}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown = read_until(ours, "> ")
        assert "Loading" in shown
        os.write(ours, b"Who are you?\n")
        shown = read_until(ours, "\n> ")
        assert len(shown.replace("Who are you?", "").strip(" >\r\n")) > 0
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:  # either comes to nothing just before readline waits
            if leave == "end":
                os.write(ours, b"\x04")
            else:
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # a second signal while Python ends would kill it
        assert process.poll() == 0
        rest = drain(ours)
        assert "Traceback" not in rest
        os.close(ours)


def read_until(terminal: int, mark: str) -> str:
    shown, until = "", time.monotonic() + 90
    while mark not in shown:
        assert time.monotonic() < until, shown
        shown += os.read(terminal, 4096).decode("utf-8", "replace")
    return shown


def drain(terminal: int) -> str:
    shown = ""
    try:
        while data := os.read(terminal, 4096):
            shown += data.decode("utf-8", "replace")
    except OSError:  # the other end is gone
        pass
    return shown


def test_a_pipe_that_nobody_reads_is_no_error(uninterrupted: Job) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), "chat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **uninterrupted.environment},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"Hi")
    process.stdin.close()
    assert process.wait(timeout=90) == 0
    assert b"Traceback" not in process.stderr.read()
