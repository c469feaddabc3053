"""A stage's events arrive, whatever its libraries print around them."""

from __future__ import annotations

import io
import json
import socket

import pytest

from job.report.console import StageRecord, open_console
from job.report.events import EVENTS_FD, LARGEST_EVENT, emit, parse


def received(event: str, **fields: object) -> bytes:
    """What the supervisor's end of the socket gets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.MonkeyPatch.context() as patched:
        patched.setenv(EVENTS_FD, str(theirs.fileno()))
        emit(event, **fields)
        return ours.recv(4 * LARGEST_EVENT)


def test_an_event_arrives_whole_on_a_socket_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(received("checkpoint", step=3)) == {"event": "checkpoint", "step": 3}
    assert capsys.readouterr().out == ""


def test_a_long_text_is_cut_so_that_its_event_fits() -> None:
    event = parse(received("message", level="info", text="ü" * 500_000))
    assert event is not None and event["text"].startswith("üüü") and len(event["text"]) < 20_000


@pytest.mark.parametrize(
    "data", [b"plain text", b'["list"]', b'{"level": "info"}', b'{"event": 3}', b"\xff", b"[" * 50_000]
)
def test_a_message_that_is_not_an_event_is_ignored(data: bytes) -> None:
    assert parse(data) is None


def test_a_terminal_gets_text_and_everything_else_gets_json_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        console = open_console("auto", "info", "a-run", stream)
        console.stage_started("train")
        console.progress("train", {"event": "progress", "done": 1, "total": 4, "unit": "steps", "loss": 2.5})
        console.say("hidden", "debug")
        record = StageRecord("train", "done", 1.5, ["adapter: somewhere"], {"loss_last": 2.5})
        console.stage_ended(record)
        console.summary([record], "The end.", exit_code=0, reason="")
    events = [json.loads(line) for line in pipe.getvalue().splitlines()]
    assert [event.get("event") for event in events] == ["stage_started", "progress", "stage_ended", "run_ended"]
    assert all({"time", "run_id", "message"} <= event.keys() for event in events)
    assert (events[-1]["exit_code"], events[-1]["reason"]) == (0, "")
    assert events[-1]["stages"] == [
        {
            "stage": "train", "result": "done", "seconds": 1.5, "outputs": ["adapter: somewhere"],
            "figures": {"loss_last": 2.5},
        }
    ]  # fmt: skip
    assert "adapter: somewhere" in terminal.getvalue()
    assert "{" not in terminal.getvalue()
    assert "hidden" not in terminal.getvalue() + pipe.getvalue()


def test_secrets_are_masked_in_both_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123")
    for form in ("text", "json"):
        stream = io.StringIO()
        console = open_console(form, "debug", "a-run", stream)
        console.say("token hf_canary_0123")
        console.summary(
            [StageRecord("train", "done", 1, ["hf_canary_0123"])],
            "hf_canary_0123",
            exit_code=1,
            reason="hf_canary_0123",
        )
        assert "canary" not in stream.getvalue()
        assert stream.getvalue().count("***") == {"text": 3, "json": 4}[form]  # the reason too, for programs
