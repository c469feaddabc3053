"""Turns the environment into `Settings`, and explains all mistakes in it at once."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.environment import env_file as env_file_variables
from job.environment import trainer_arguments
from job.environment.contradictions import contradictions
from job.environment.local_files import missing_paths, unusable_files
from job.environment.mixture import parts_of
from job.errors import InputError, SettingsError
from job.guard.secrets import masked, secret_values, tidy
from job.settings import PREFIX, Settings, allowed_text, default_text, variable


def load_settings() -> Settings:
    """Read the environment and FT_ENV_FILE (the environment wins). Raises one SettingsError with every mistake.

    InputError if the settings are right, and a local file that they name cannot be used.
    """
    named = os.environ.get("FT_ENV_FILE")
    env_file = Path(named or str(Settings.model_fields["env_file"].default)).expanduser()
    problems = []
    if named and (not env_file.exists() or env_file.is_dir()):
        problems.append(f"FT_ENV_FILE={named!r}: there is no such file.")
    elif env_file.is_file() and not os.access(env_file, os.R_OK):
        problems.append(f"FT_ENV_FILE={str(env_file)!r}: this user may not read it.")
    if env_file.is_file() and not problems:
        problems += env_file_variables.load(env_file)
    problems += [
        f"{name} holds a character that no key has, such as a typographic quotation mark: copy it again."
        for name in tidy()
    ]
    problems += _unknown_names()
    try:
        settings = Settings()
    except ValidationError as error:
        malformed = _malformed_values(error)
        problems += malformed.values()
        # report the other mistakes too, so continue as if the malformed variables were unset
        settings = Settings(**{name: Settings.model_fields[name].default for name in malformed})
    problems += contradictions(settings) + trainer_arguments.problems_of(settings)
    try:
        parts_of(settings.dataset_name)
    except ValueError as error:
        problems.append(f"FT_DATASET_NAME={settings.dataset_name!r}: {error}.")
    else:
        problems += missing_paths(settings)
    if problems:
        count = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise SettingsError(
            masked(f"{count} wrong:\n{listing}", secret_values()),
            "Nothing was downloaded. `python entrypoint.py settings` lists every variable.",
        )
    if unusable := unusable_files(settings):
        raise InputError("\n".join(unusable), "Nothing was downloaded. Check the files, or name others.")
    return settings


def _unknown_names() -> list[str]:
    known = [variable(name) for name in Settings.model_fields]
    problems = []
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            meant = _meant(name.upper().removeprefix(PREFIX), [setting.removeprefix(PREFIX) for setting in known])
            hint = f"Did you mean {' or '.join(meant)}?" if meant else "Unset it."
            problems.append(f"{name}: unknown setting. {hint}")
    return problems


def _meant(name: str, known: list[str]) -> list[str]:
    """The variables that a name without its prefix may stand for: those with all of its words before those that look alike."""
    if env_file_variables.is_allowed(name):
        return [name]  # HF_TOKEN and its like have no prefix
    words = set(name.split("_"))
    found = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        or [
            one for one in known if words <= set(one.split("_")) or name == "".join(word[0] for word in one.split("_"))
        ][:3]
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    )
    return [PREFIX + one for one in found]


def _malformed_values(error: ValidationError) -> dict[str, str]:
    """Field name → one line. A union reports one error per member, but the allowed values cover them all."""
    problems: dict[str, str] = {}
    for detail in error.errors():
        field_name = str(detail["loc"][0])
        if field_name not in Settings.model_fields:
            field_name = field_name.lower().removeprefix(PREFIX.lower())
        reason = str(detail["msg"]).removeprefix("Value error, ")
        plain = (
            f"{variable(field_name)}={os.environ.get(variable(field_name), '')!r}: must be {allowed_text(field_name)}"
        )
        if detail["type"] == "value_error":
            plain += f" ({reason})"
        default = default_text(field_name)
        way_out = "Or unset it." if default == "(unset)" else f"Or unset it for the default, {default}."
        problems.setdefault(field_name, f"{plain}. {way_out}")
    return problems


def settings_table() -> list[dict[str, Any]]:
    """Name, allowed values, default and meaning of every variable, in class order."""
    return [
        {
            "name": variable(name),
            "allowed": allowed_text(name),
            "default": default_text(name),
            "meaning": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]


def as_json(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values. By construction, none of them is a secret."""
    return dict(json.loads(settings.model_dump_json()))
