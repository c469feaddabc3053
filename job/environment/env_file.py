"""A file of further variables, `.env` or FT_ENV_FILE: data that whoever wrote the folder may have chosen.

It may set the job's own variables and the documented secrets, and nothing that changes how programs run. An endpoint
that it sets never receives a token that it did not set too.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from job.guard.secrets import AWS, HUB, KNOWN

READ = "JOB_ENV_FILE_READ"  # names the file that was read, for the first log line
_LARGEST = 1 << 20
_ALLOWED = re.compile(
    r"FT_\w+|HF_ENDPOINT|HF_HUB_OFFLINE|AWS_(?:DEFAULT_)?REGION|AWS_ENDPOINT_URL(?:_S3)?|WANDB_(?:PROJECT|ENTITY|MODE|NAME|BASE_URL)"
)
_ENDPOINTS = {
    "HF_ENDPOINT": HUB,
    "AWS_ENDPOINT_URL": AWS,
    "AWS_ENDPOINT_URL_S3": AWS,
    "WANDB_BASE_URL": ("WANDB_API_KEY",),
}


def is_allowed(name: str) -> bool:
    """Whether a file may set this variable: one of the job's own or a documented secret, place or name."""
    return name in KNOWN or _ALLOWED.fullmatch(name.upper()) is not None


def load(file: Path) -> list[str]:
    """Put the file's variables into the environment, which takes precedence. Returns what is wrong, one line each."""
    if file.stat().st_size > _LARGEST:
        return [f"{file}: {file.stat().st_size:,} bytes are too many for a file of settings."]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{file} cannot be read: {error}."]
    if unread := _unread_lines(file, text):
        return unread
    found = dotenv_values(stream=io.StringIO(text), interpolate=False)  # `${HF_TOKEN}` must not end in a model's name
    values = {name: value for name, value in found.items() if value is not None and name not in os.environ}
    problems = [
        f"{file} sets {name}, which a file may not set: set it in the environment."
        for name in found
        if not is_allowed(name)
    ]
    problems += [_misdirected(file, name, values) for name in _ENDPOINTS if name in values]
    problems = [problem for problem in problems if problem]
    if not problems:
        os.environ.update(values)
        os.environ[READ] = str(file)
        if "HF_ENDPOINT" in values and not set(HUB) & values.keys():
            os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # noqa: S105 (a switch); nor one that was saved on this machine
    return problems


def _unread_lines(file: Path, text: str) -> list[str]:
    """What dotenv would leave out with a warning, or none: a setting that is lost without a word. No value is quoted."""
    return [
        f"{file}, line {binding.original.line + _blank_lines(binding.original.string)}: not of the form NAME=value. Write it so, "
        "close its quotes, or begin the line with #."
        for binding in parse_stream(io.StringIO(text))
        if binding.error or (binding.key is not None and binding.value is None)
    ]


def _blank_lines(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _misdirected(file: Path, endpoint: str, values: dict[str, str]) -> str:
    """What is wrong if a secret of the environment would go where the file says."""
    secrets = [name for name in _ENDPOINTS[endpoint] if os.environ.get(name) and name not in values]
    if not secrets:
        return ""
    return (
        f"{file} sets {endpoint}, and {secrets[0]} comes from the environment: it would be sent to that host. "
        f"Set {endpoint} in the environment too, if you mean it."
    )
