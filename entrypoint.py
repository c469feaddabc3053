"""The job's front door: `python entrypoint.py [run|plan|data|chat|status|settings]`. Everything else is an environment variable."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
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
from job.cluster import keep_private, node_name, scheduler_run_id
from job.environment import load_settings, settings_table
from job.environment.env_file import READ
from job.errors import ExitCode, JobError, SettingsError, Stopped, from_os_error
from job.guard.escape import for_terminal, json_line
from job.guard.secrets import masked, masked_fields, secret_values
from job.leave import leave
from job.paths import WITHOUT_WEIGHTS
from job.report.console import is_text, open_console
from job.run import Run, now
from job.settings import STAGE_NAMES, Settings

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


# No library counts our uses on a server; `plan` and `status` use them in this process.
_QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "DO_NOT_TRACK": "1"}

# What `data` changes about a run: it needs no GPU, publishes nothing and ends when the data is prepared.
ONLY_DATA = {
    "FT_STAGES": "prepare", "FT_DEVICE": "cpu", "FT_PUBLISH_TO": "", "FT_STORE_URL": "", "FT_RUN_ID": "data", "FT_NNODES": "1", "FT_NODE_RANK": "0",
    WITHOUT_WEIGHTS: "1",
}  # fmt: skip

COMMANDS = {
    "run": "run the job (the default): every requested stage that is not complete",
    "plan": "show what a run would do: sources, sizes, steps, disk, GPU memory and speed; changes nothing",
    "data": "download and prepare the data only, without the model's weights or a GPU, and report on it",
    "chat": "talk with the finished model; with --adapter or --base, with those instead",
    "status": "show which stages of the run are complete and which checkpoints are stored",
    "settings": "list every environment variable",
}


def main(arguments: list[str]) -> int:
    """Parse the command, hand over, and turn what went wrong into a sentence and an exit code."""
    os.umask(os.umask(0o077) | 0o007)  # logs and data reports are not for everyone on the machine
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _leave)  # until the supervisor listens; PID 1 of a container would ignore it
    try:
        return _dispatch(_parse(arguments))
    except BrokenPipeError:  # `entrypoint.py settings | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except JobError as error:
        return _report(error)
    except Exception as error:  # the outermost boundary
        if (refusal := from_os_error(error)) is not None:
            return _report(refusal)
        masked_trace = masked(traceback.format_exc(), secret_values())
        return _report(JobError(f"{type(error).__name__}: {error}", f"This is a bug.\n{masked_trace}"))


def _parse(arguments: list[str]) -> str:
    """The command; SettingsError for one that does not exist."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {does}" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="entrypoint.py",
        usage="entrypoint.py [COMMAND]",
        description=f"Fine-tune a language model with QLoRA, from download to published model.\n\ncommands:\n{listing}",
        epilog="Everything else is an environment variable: see `entrypoint.py settings`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("command", nargs="?", default="run", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", action="store_true", help="chat: the base model with the adapter as trained")
    parser.add_argument("--base", action="store_true", help="chat: the base model alone")
    parser.add_argument("--version", action="store_true", help="show the versions of the job, CUDA and the packages")
    parsed, unknown = parser.parse_known_args(arguments)
    if parsed.version:
        return "--version"
    wrong = unknown or ([] if parsed.command in COMMANDS else [parsed.command])
    chosen = [f"--{name}" for name in ("adapter", "base") if getattr(parsed, name)]
    if chosen and not wrong and (parsed.command != "chat" or len(chosen) > 1):
        raise SettingsError(f"{' and '.join(chosen)} cannot be used here.", "Use one of them, with chat.")
    if wrong:
        near = difflib.get_close_matches(wrong[0].lstrip("-"), [*COMMANDS, *STAGE_NAMES], n=1, cutoff=0.5)
        hint = ""
        if near:
            meant = near[0] if near[0] in COMMANDS else f"FT_STAGES={near[0]} python entrypoint.py"
            hint = f"Did you mean `{meant}`? "
        raise SettingsError(f"{wrong[0]!r} is not a command.", f"{hint}The commands are {', '.join(COMMANDS)}.")
    return " ".join([str(parsed.command), *chosen])


def _dispatch(command: str) -> int:
    if command == "--version":
        print(_versions())
        return ExitCode.OK
    if command == "settings":
        _print_settings()
        return ExitCode.OK
    if command == "data":
        os.environ |= ONLY_DATA
    settings = load_settings()
    if command == "data":  # beside the runs, so that none is touched
        os.environ["FT_OUTPUT_DIR"] = str(settings.output_dir.absolute() / "data")
        settings = Settings()
    run = Run.of(settings)
    try:
        if command.startswith("chat"):
            _chat(run, command.partition("--")[2] or "merged")
        else:
            {"run": _run, "plan": _plan, "data": _data, "status": _status}[command](run)
        sys.stdout.flush()
    except JobError as error:
        error.run_id = run.id
        raise
    return ExitCode.OK


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(ExitCode.TRY_AGAIN)


def _run(run: Run) -> None:
    from job.supervision.follower import Follower
    from job.supervision.supervisor import Supervisor

    keep_private()
    settings = run.settings
    console = open_console(settings.log_format, settings.log_level, run.id)
    if (file := os.environ.get(READ)) is not None:
        console.say(f"Settings also come from {file}.")
    console.say(f"Run {run.id}: {settings.model_name} on {settings.dataset_name}.", store=run.store.url)
    (Supervisor if run.node.leads else Follower)(run, console).supervise()


def _plan(run: Run) -> None:
    from job.commands.plan import print_plan

    print_plan(run)


def _chat(run: Run, which: str) -> None:
    from job.commands.chat import chat

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may have ignored it
    chat(run, which)


def _data(run: Run) -> None:
    from job.commands.data import look_at_data

    keep_private()
    settings = run.settings
    look_at_data(run, open_console(settings.log_format, settings.log_level, run.id))


def _status(run: Run) -> None:
    from job.commands.status import print_status

    print_status(run)


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
    secrets, wished = secret_values(), isinstance(error, Stopped)
    record = {
        "time": now(),
        "level": "info" if wished else "error",
        "run_id": error.run_id or os.environ.get("FT_RUN_ID") or scheduler_run_id(),
        "event": "stopped" if wished else "error",
        "exit_code": int(error.exit_code),
        "retry": error.retry,
        "message": error.message,
        "hint": error.hint,
    }
    line = json_line(masked_fields(record, secrets))
    as_text = is_text(os.environ.get("FT_LOG_FORMAT", "auto").lower(), sys.stderr)  # the settings may be what is wrong
    print(
        for_terminal(masked(str(error) if wished else f"error: {error}", secrets)) if as_text else line,
        file=sys.stderr,
        flush=True,
    )
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
    leave(main(sys.argv[1:]))
