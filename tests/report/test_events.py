"""A stage's events arrive, whatever its libraries print around them."""

from __future__ import annotations

import io
import json

import pytest

from job.report.console import StageRecord, open_console
from job.report.events import emit, parse


def emitted(capsys: pytest.CaptureFixture[str], event: str, **fields: object) -> str:
    emit(event, **fields)
    return capsys.readouterr().out.rstrip("\n")


def test_an_event_is_read_back_even_after_a_librarys_unfinished_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = emitted(capsys, "checkpoint", step=3)
    assert parse(line) == ("", {"event": "checkpoint", "step": 3})
    assert parse(f"loading 50%{line}") == ("loading 50%", {"event": "checkpoint", "step": 3})


@pytest.mark.parametrize("line", ["plain text", '{"event": "checkpoint"}', "\x1enot json", '\x1e["list"]'])
def test_a_line_that_is_not_an_event_is_text(line: str) -> None:
    assert parse(line) == (line, None)


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
