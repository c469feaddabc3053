"""Turns the environment into `Settings`, and explains all mistakes in it at once."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.cluster import this_node
from job.environment import env_file as env_file_variables
from job.environment import trainer_arguments
from job.environment.local_files import SOURCES, missing_paths, unusable_files
from job.environment.mixture import parts_of
from job.errors import InputError, SettingsError
from job.guard.secrets import keys_in, masked, secret_values, tidy
from job.settings import PREFIX, Settings, allowed_text, default_text, variable
from job.storage import SCHEMES, scheme_of

_KEYS_IN_URL = "a URL must not hold keys. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
_ROLES = ("system", "user", "assistant", "tool", "developer")  # a template of one's own may know others


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


def contradictions(settings: Settings) -> list[str]:
    problems = []
    if settings.fp16 is True and settings.bf16 is True:
        problems.append("FT_FP16 and FT_BF16 are both true: choose one, or leave both at auto.")
    if settings.use_nested_quant and not settings.use_4bit:
        problems.append(
            "FT_USE_NESTED_QUANT=true quantizes the constants of 4-bit weights, so it needs FT_USE_4BIT=true."
        )
    if settings.eval_dataset_name is not None and (settings.eval_split or "").replace(".", "", 1).isdigit():
        problems.append(
            f"FT_EVAL_SPLIT={settings.eval_split!r} holds out part of the training data, but FT_EVAL_DATASET_NAME names another "
            "dataset: set FT_EVAL_SPLIT to one of its splits, such as test or train[:100], or unset it for train."
        )
    named = settings.chat_template
    if named not in ("auto", "llama-2", "chatml") and not Path(named).expanduser().is_file():
        problems.append(
            f"FT_CHAT_TEMPLATE={named!r} is neither a file nor a known template: use auto, llama-2 or chatml."
        )
    elif named not in ("auto", "llama-2", "chatml") and not _is_text(Path(named).expanduser()):
        problems.append(f"FT_CHAT_TEMPLATE={named!r} is not a text in UTF-8: save the file in that encoding.")
    if settings.s3_sse_kms_key_id is not None and not (settings.s3_server_side_encryption or "").startswith("aws:kms"):
        problems.append(
            "FT_S3_SSE_KMS_KEY_ID names a key that only KMS encrypts with: set FT_S3_SERVER_SIDE_ENCRYPTION=aws:kms, or unset it."
        )
    targets = settings.lora_target_modules
    if not isinstance(targets, str) and (not targets or {"auto", "all-linear"} & set(targets)):
        problems.append(
            f"FT_LORA_TARGET_MODULES={','.join(targets)!r} names no layers: use auto, all-linear, or names such as q_proj,v_proj."
        )
    if not isinstance(targets, str) and (
        odd := [name for name in targets if re.search(r"(^|\.)(lm_head|embed_tokens|wte)$", name)]
    ):
        problems.append(
            f"FT_LORA_TARGET_MODULES names {odd[0]}, which is no inner layer: name linear layers of the decoder, or use all-linear."
        )
    problems += [
        f"FT_DATASET_ROLES reads {name!r} as {role!r}: did you mean {near[0]}?"
        for name, role in settings.dataset_roles.items()
        if role not in _ROLES and (near := difflib.get_close_matches(role.lower(), _ROLES, n=1, cutoff=0.7))
    ]
    problems += _unusual_adapters(settings)
    if settings.device_map.startswith("{") and not _is_json(settings.device_map):
        problems.append(f"FT_DEVICE_MAP={settings.device_map!r} is not a JSON object.")
    if settings.eval_steps is not None and not settings.evaluates:
        problems.append("FT_EVAL_STEPS is set, but there is nothing to evaluate on: set FT_EVAL_SPLIT too.")
    if settings.early_stopping_patience is not None and settings.eval_steps is None:
        problems.append("FT_EARLY_STOPPING_PATIENCE counts evaluations: set FT_EVAL_STEPS and FT_EVAL_SPLIT too.")
    if settings.device == "cpu" and (settings.fp16 is True or settings.bnb_4bit_compute_dtype == "float16"):
        problems.append(
            "FT_DEVICE=cpu cannot compute in float16: use float32 or bfloat16, or leave the setting at auto."
        )
    try:
        node = this_node(settings.nnodes, settings.node_rank)
    except ValueError as error:
        problems.append(str(error))
    else:
        if node.count > 1 and settings.device_map != "auto":
            problems.append(
                "FT_DEVICE_MAP spreads the model over one machine's GPUs: leave it at auto with several nodes."
            )
    if settings.master_addr != "auto" and not re.fullmatch(r"[\w.-]+", settings.master_addr):
        problems.append(
            f"FT_MASTER_ADDR={settings.master_addr!r}: must be only a host name or an IPv4 address. Set the port in FT_MASTER_PORT."
        )
    if settings.sharding == "full" and settings.device_map != "auto":
        problems.append("FT_SHARDING=full spreads the model itself: leave FT_DEVICE_MAP at auto.")
    if settings.sharding == "full" and settings.early_stopping_patience is not None:
        problems.append(
            "FT_EARLY_STOPPING_PATIENCE keeps the best adapter of a single process, so it needs FT_SHARDING=none."
        )
    problems += _contradictory_plans(settings)
    if not settings.stages:
        problems.append("FT_STAGES names no stage: unset it to run all of them.")
    places = [("store_url", settings.store_url), *(("publish_to", place) for place in settings.destinations)]
    problems += [
        f"{variable(name)}={value!r}: {problem}"
        for name, value in places
        if value is not None and (problem := _near_miss(name, value)) is not None
    ]
    folders = {"output_dir": settings.output_dir, "store_url": Path((settings.store_url or "").removeprefix("file://"))}
    problems += [
        f"{variable(name)}={str(folder)!r}: must be a folder, and is a file."
        for name, folder in folders.items()
        if folder.expanduser().is_file()
    ]
    problems += _sources(settings)
    problems += _hub_places(settings)
    needed = {
        package
        for kind in settings.export
        for package in (("compressed_tensors",) if kind == "fp8" else ("gguf", "llama_cpp"))
    }
    if any(importlib.util.find_spec(package) is None for package in needed):
        problems.append(
            f"FT_EXPORT={','.join(settings.export)!r} needs packages that are not installed: pip install -r requirements-export.txt."
        )
    if settings.export and settings.publish == "adapter":
        problems.append("FT_EXPORT exports the merged model, and FT_PUBLISH=adapter makes none: unset one.")
    if settings.store_url and scheme_of(settings.store_url) not in SCHEMES:
        known = " or ".join(f"{scheme}://…" for scheme in SCHEMES if scheme not in ("", "file"))
        problems.append(f"FT_STORE_URL={settings.store_url!r}: must be a folder or {known}.")
    return problems


def _unusual_adapters(settings: Settings) -> list[str]:
    """What does not go together with DoRA, patterns and layers that are trained in full."""
    problems = []
    inner = [name for name in settings.modules_to_save if not re.search(r"(^|\.)(lm_head|embed_tokens|\w*norm)$", name)]
    if inner and settings.use_4bit:
        problems.append(
            f"FT_MODULES_TO_SAVE names {inner[0]}, which is in 4 bits and cannot be trained in full: name lm_head, embed_tokens or norms, or set FT_USE_4BIT=false."
        )
    if settings.new_tokens and {"embed_tokens", "lm_head"} & set(settings.modules_to_save):
        problems.append(
            "FT_NEW_TOKENS trains rows of matrices that FT_MODULES_TO_SAVE trains in full: unset one of them."
        )
    if len(set(settings.new_tokens)) < len(settings.new_tokens):
        problems.append("FT_NEW_TOKENS names a token twice.")
    unusual = {
        "FT_USE_DORA=true": settings.use_dora, "FT_LORA_RANK_PATTERN": bool(settings.lora_rank_pattern),
        "FT_MODULES_TO_SAVE": bool(settings.modules_to_save), "FT_NEW_TOKENS": bool(settings.new_tokens),
    }  # fmt: skip
    against = {
        "FT_SHARDING=full": settings.sharding == "full", "FT_DECODER_LAYERS=fused": settings.decoder_layers == "fused",
        "FT_FROZEN_PRECISION=fp8": settings.frozen_precision == "fp8",
    }  # fmt: skip
    return problems + [
        f"{kind} and {other} do not work together: unset one."
        for kind, is_so in unusual.items()
        for other, rules_out in against.items()
        if is_so and rules_out
    ]


def _sources(settings: Settings) -> list[str]:
    """Names of models and datasets that are neither Hub ids, paths nor places in S3."""
    problems = []
    for setting in SOURCES:
        text = getattr(settings, setting) or ""
        if keys_in(text) is not None:
            problem = _KEYS_IN_URL.rstrip(".")
        elif re.search(r"""(^|[,\s"])(?!s3:)[A-Za-z]\w*://|^[A-Za-z]:\\""", text):
            problem = "a URL or a path of Windows is no source"
        elif re.search(r"""(^|[,\s"])s3://([/,*:"]|$)""", text):
            problem = "no bucket is named"
        else:
            continue
        problems.append(
            f"{variable(setting)}={text!r}: {problem}. Write user/name for the Hub, s3://bucket/prefix, or a path."
        )
    return problems


def _hub_places(settings: Settings) -> list[str]:
    """What is wrong with the Hub repositories that FT_PUBLISH_TO names."""
    problems = []
    for place in settings.destinations:
        if not place.startswith("hf:"):
            continue
        if re.fullmatch(r"hf://([\w.-]+/)?[\w.-]+(@[\w.-]+)?/?", place) is None:
            problems.append(
                f"FT_PUBLISH_TO={place!r}: write a Hub repository as hf://user/name or hf://user/name@branch."
            )
        elif (bad := _no_git_name(place.rstrip("/").partition("@")[2] or "main")) is not None:
            problems.append(f"FT_PUBLISH_TO={place!r}: git allows no branch {bad}.")
        elif "publish" in settings.stages and not os.environ.get("HF_TOKEN"):
            problems.append(f"FT_PUBLISH_TO={place!r} needs HF_TOKEN, a token with write access to the Hub.")
    if settings.run_id and any(place.startswith("hf:") for place in settings.destinations):
        bad = _no_git_name(settings.run_id)
        if bad is not None:
            problems.append(f"FT_RUN_ID={settings.run_id!r} becomes a tag on the Hub, and git allows none {bad}.")
    if len(set(settings.destinations)) < len(settings.destinations):
        problems.append(f"FT_PUBLISH_TO={settings.publish_to!r} names a place twice.")
    return problems


def _no_git_name(name: str) -> str | None:
    """What is wrong with the name of a branch or tag, of those that the settings allow (git-check-ref-format(1))."""
    if ".." in name:
        return "with two dots in a row"
    if name.startswith((".", "-")):
        return f"that begins with {name[0]!r}"
    return next((f"that ends with {end!r}" for end in (".lock", ".") if name.endswith(end)), None)


def _near_miss(name: str, value: str) -> str | None:
    """Why a text is no place for what is stored or published, or was surely meant as another one."""
    if keys_in(value) is not None:
        return _KEYS_IN_URL
    if re.match(r"s3://(/|$)", value):
        return "names no bucket: write s3://bucket/prefix."
    misspelt = re.match(r"(s3|hf|gs|file|https?)(?::/?(?!/)|//)", value, re.IGNORECASE)
    if misspelt is not None and not value.startswith("hf:"):
        return f"write {misspelt[1]}://… with two slashes, or ./{value} for a folder of that name."
    if name != "publish_to":
        return None
    if "://" in value and not value.startswith(("hf://", "s3://")):
        return "must be hf://user/name, s3://bucket/prefix or a folder."
    if value.startswith("s3://") and not value.removeprefix("s3://").strip("/").partition("/")[2]:
        return "names no prefix: write s3://bucket/prefix."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not Path(value.partition("/")[0]).exists():
        return f"write hf://{value} for the Hub, or ./{value} for a folder."
    return None


def _contradictory_plans(settings: Settings) -> list[str]:
    """Contradictions between the settings that decide how steps are computed."""
    problems = []
    if settings.recomputed_layers != "auto" and settings.gradient_checkpointing != "auto":
        problems.append(
            "FT_RECOMPUTED_LAYERS is a number of layers, and FT_GRADIENT_CHECKPOINTING means all or none: set only one of them."
        )
    asked = {
        "FT_FROZEN_PRECISION=fp8": settings.frozen_precision == "fp8",
        "FT_DECODER_LAYERS=fused": settings.decoder_layers == "fused",
    }
    against = {
        f"FT_DECODER_LAYERS={settings.decoder_layers}": settings.decoder_layers in ("plain", "compiled"),
        "FT_PADDING_FREE=false": settings.padding_free is False and not settings.packing,
        "FT_SHARDING=full": settings.sharding == "full",
        f"FT_DEVICE_MAP={settings.device_map}": settings.device_map != "auto",
        "FT_BNB_4BIT_COMPUTE_DTYPE=float32": settings.bnb_4bit_compute_dtype == "float32" and settings.device == "cuda",
    }
    for wanted in (name for name, is_so in asked.items() if is_so):
        problems += [
            f"{wanted} and {other} do not work together: unset one." for other, is_so in against.items() if is_so
        ]
    if settings.frozen_precision == "fp8":
        if settings.resident_weights != "auto":
            problems.append("FT_FROZEN_PRECISION=fp8 keeps weights in 8 bits: leave FT_RESIDENT_WEIGHTS at auto.")
        if settings.device == "cpu":
            problems.append("FT_FROZEN_PRECISION=fp8 needs a GPU: unset it for FT_DEVICE=cpu.")
    if settings.resident_weights != "auto" and not settings.use_4bit:
        problems.append("FT_RESIDENT_WEIGHTS applies only to 4-bit weights: unset it for FT_USE_4BIT=false.")
    if settings.padding_free is False and settings.packing:
        problems.append("FT_PACKING=true concatenates rows without padding: leave FT_PADDING_FREE at auto.")
    for name in ("recomputed_layers", "micro_batch_tokens"):
        if getattr(settings, name) != "auto":
            problems += [
                f"{variable(name)} works only with fused layers, which {other} rules out: unset one."
                for other, is_so in against.items()
                if is_so
            ]
    return problems


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _is_text(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


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
