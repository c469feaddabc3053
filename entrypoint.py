"""The job's front door: `python entrypoint.py [run|plan|settings|status]`. Everything else is an environment variable."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from job import __version__
from job.cluster import node_name
from job.environment import load_settings, settings_table
from job.errors import ExitCode, JobError, from_os_error
from job.report.console import open_console
from job.run import Run
from job.settings import Settings, masked, secret_values

_VERSIONS_OF = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "boto3",
)


def main(arguments: list[str]) -> int:
    """Parse, hand over, and turn what went wrong into a sentence and an exit code."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a language model with QLoRA, from download to published model."
    )
    parser.add_argument("command", nargs="?", default="run", choices=("run", "plan", "settings", "status"))
    parser.add_argument("--version", action="store_true", help="versions of the job, of CUDA and of the packages")
    parsed = parser.parse_args(arguments)
    if parsed.version:
        print(_versions())
        return ExitCode.OK
    command = parsed.command
    signal.signal(signal.SIGTERM, _leave)  # until the supervisor listens; PID 1 of a container would ignore it
    try:
        if command == "settings":
            _print_settings()
            return ExitCode.OK
        settings = load_settings()
        return {"run": _run, "plan": _plan, "status": _status}[command](settings)
    except JobError as error:
        return _report(error)
    except Exception as error:  # the outermost boundary
        if (refusal := from_os_error(error)) is not None:
            return _report(refusal)
        masked_trace = masked(traceback.format_exc(), secret_values())
        return _report(JobError(f"{type(error).__name__}: {error}", f"This is a bug.\n{masked_trace}"))


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(ExitCode.TRY_AGAIN)


def _run(settings: Settings) -> int:
    from job.supervision.follower import Follower
    from job.supervision.supervisor import Supervisor

    run = Run.of(settings)
    console = open_console(settings.log_format, settings.log_level, run.id)
    console.say(f"Run {run.id}: {settings.model_name} on {settings.dataset_name}.", store=run.store.url)
    (Supervisor if run.node.leads else Follower)(run, console).supervise()
    return ExitCode.OK


def _plan(settings: Settings) -> int:
    from job.commands.plan import print_plan

    print_plan(Run.of(settings))
    return ExitCode.OK


def _status(settings: Settings) -> int:
    from job.commands.status import print_status

    print_status(Run.of(settings))
    return ExitCode.OK


def _print_settings() -> None:
    for row in settings_table():
        print(f"{row['name']}\n    {row['meaning']}\n    {row['allowed']}; default: {row['default']}")


def _versions() -> str:
    lines = [f"finetune-job {__version__}"]
    for package in _VERSIONS_OF:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} is not installed")
    lines.insert(2, f"CUDA {_cuda_version() or 'none'}")
    return ", ".join(lines)


def _cuda_version() -> str | None:
    """The CUDA that torch was built for, read from its source: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(
        r"^cuda\b.*= '([\d.]+)'", Path(spec.origin).with_name("version.py").read_text("utf-8"), re.MULTILINE
    )
    return found[1] if found else None


def _report(error: JobError) -> int:
    """The last word: on standard error, as JSON where logs are JSON, and in Kubernetes' termination message."""
    secrets = secret_values()
    record = {
        "event": "error",
        "level": "error",
        "exit_code": int(error.exit_code),
        "message": error.message,
        "hint": error.hint,
    }
    line = masked(json.dumps(record, ensure_ascii=False), secrets)
    as_text = os.environ.get("FT_LOG_FORMAT") == "text" or (
        os.environ.get("FT_LOG_FORMAT") != "json" and sys.stderr.isatty()
    )
    print(masked(f"error: {error}", secrets) if as_text else line, file=sys.stderr, flush=True)
    _write_termination_message(line)
    return int(error.exit_code)


def _write_termination_message(line: str) -> None:
    """For who started us: Kubernetes makes the file, `slurm/train.sh` a folder; elsewhere neither is there."""
    default = Settings.model_fields["termination_log"].default
    place = Path(os.environ.get("FT_TERMINATION_LOG") or default)  # the settings may be what is wrong
    file = place / f"{node_name()}.json" if place.is_dir() else place
    if place.exists():
        try:
            file.write_text(line[:4096], encoding="utf-8")
        except OSError as failure:
            print(f"could not write {file}: {failure}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
