"""What is wrong with settings that are each of the right kind: contradictions, and places and names that cannot be meant."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from job.cluster import this_node
from job.environment.local_files import SOURCES
from job.guard.secrets import keys_in
from job.settings import Settings, variable
from job.storage import SCHEMES, scheme_of

_KEYS_IN_URL = "a URL must not hold keys. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
_ROLES = ("system", "user", "assistant", "tool", "developer")  # a template of one's own may know others


def contradictions(settings: Settings) -> list[str]:
    """One line for each mistake: the variable and its value, why it cannot be, and the way out."""
    checks = (_of_precision, _of_data, _adapters, _of_evaluation, _of_machines, _plans, _of_places, _sources, _hub_places, _of_exports)  # fmt: skip
    return [problem for check in checks for problem in check(settings)]


def _of_precision(settings: Settings) -> Iterator[str]:
    if settings.fp16 is True and settings.bf16 is True:
        yield "FT_FP16 and FT_BF16 are both true: choose one, or leave both at auto."
    if settings.use_nested_quant and not settings.use_4bit:
        yield "FT_USE_NESTED_QUANT=true quantizes the constants of 4-bit weights, so it needs FT_USE_4BIT=true."
    if settings.device == "cpu" and (settings.fp16 is True or settings.bnb_4bit_compute_dtype == "float16"):
        yield "FT_DEVICE=cpu cannot compute in float16: use float32 or bfloat16, or leave the setting at auto."


def _of_data(settings: Settings) -> Iterator[str]:
    named = settings.chat_template
    if named not in ("auto", "llama-2", "chatml"):
        file = Path(named).expanduser()
        if not file.is_file():
            yield f"FT_CHAT_TEMPLATE={named!r} is neither a file nor a known template: use auto, llama-2 or chatml."
        elif not _is_text(file):
            yield f"FT_CHAT_TEMPLATE={named!r} is not a text in UTF-8: save the file in that encoding."
    for name, role in settings.dataset_roles.items():
        near = difflib.get_close_matches(role.lower(), _ROLES, n=1, cutoff=0.7)
        if role not in _ROLES and near:
            yield f"FT_DATASET_ROLES reads {name!r} as {role!r}: did you mean {near[0]}?"
    if not settings.stages:
        yield "FT_STAGES names no stage: unset it to run all of them."


def _of_evaluation(settings: Settings) -> Iterator[str]:
    if settings.eval_dataset_name is not None and (settings.eval_split or "").replace(".", "", 1).isdigit():
        yield (
            f"FT_EVAL_SPLIT={settings.eval_split!r} holds out part of the training data, but FT_EVAL_DATASET_NAME names another "
            "dataset: set FT_EVAL_SPLIT to one of its splits, such as test or train[:100], or unset it for train."
        )
    if settings.eval_steps is not None and not settings.evaluates:
        yield "FT_EVAL_STEPS is set, but there is nothing to evaluate on: set FT_EVAL_SPLIT too."
    if settings.early_stopping_patience is not None and settings.eval_steps is None:
        yield "FT_EARLY_STOPPING_PATIENCE counts evaluations: set FT_EVAL_STEPS and FT_EVAL_SPLIT too."
    if settings.sharding == "full" and settings.early_stopping_patience is not None:
        yield "FT_EARLY_STOPPING_PATIENCE keeps the best adapter of a single process, so it needs FT_SHARDING=none."


def _of_machines(settings: Settings) -> Iterator[str]:
    if settings.device_map.startswith("{") and not _is_json(settings.device_map):
        yield f"FT_DEVICE_MAP={settings.device_map!r} is not a JSON object."
    try:
        node = this_node(settings.nnodes, settings.node_rank)
    except ValueError as error:
        yield str(error)
    else:
        if node.count > 1 and settings.device_map != "auto":
            yield "FT_DEVICE_MAP spreads the model over one machine's GPUs: leave it at auto with several nodes."
    if settings.master_addr != "auto" and not re.fullmatch(r"[\w.-]+", settings.master_addr):
        yield (
            f"FT_MASTER_ADDR={settings.master_addr!r}: must be only a host name or an IPv4 address. Set the port in FT_MASTER_PORT."
        )
    if settings.sharding == "full" and settings.device_map != "auto":
        yield "FT_SHARDING=full spreads the model itself: leave FT_DEVICE_MAP at auto."


def _of_places(settings: Settings) -> Iterator[str]:
    """Where things are kept, stored and published."""
    if settings.s3_sse_kms_key_id is not None and not (settings.s3_server_side_encryption or "").startswith("aws:kms"):
        yield (
            "FT_S3_SSE_KMS_KEY_ID names a key that only KMS encrypts with: set FT_S3_SERVER_SIDE_ENCRYPTION=aws:kms, or unset it."
        )
    places = [("store_url", settings.store_url), *(("publish_to", place) for place in settings.destinations)]
    for name, value in places:
        if value is not None and (problem := _near_miss(name, value)) is not None:
            yield f"{variable(name)}={value!r}: {problem}"
    folders = {"output_dir": settings.output_dir, "store_url": Path((settings.store_url or "").removeprefix("file://"))}
    for name, folder in folders.items():
        if folder.expanduser().is_file():
            yield f"{variable(name)}={str(folder)!r}: must be a folder, and is a file."
    if settings.store_url and scheme_of(settings.store_url) not in SCHEMES:
        known = " or ".join(f"{scheme}://…" for scheme in SCHEMES if scheme not in ("", "file"))
        yield f"FT_STORE_URL={settings.store_url!r}: must be a folder or {known}."


def _of_exports(settings: Settings) -> Iterator[str]:
    needed = {
        package
        for kind in settings.export
        for package in (("compressed_tensors",) if kind == "fp8" else ("gguf", "llama_cpp"))
    }
    if any(importlib.util.find_spec(package) is None for package in needed):
        yield (
            f"FT_EXPORT={','.join(settings.export)!r} needs packages that are not installed: pip install -r requirements-export.txt."
        )
    if settings.export and settings.publish == "adapter":
        yield "FT_EXPORT exports the merged model, and FT_PUBLISH=adapter makes none: unset one."


def _adapters(settings: Settings) -> list[str]:
    """The layers that are trained, and what does not go together with DoRA, patterns and layers that are trained in full."""
    problems = []
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


def _plans(settings: Settings) -> list[str]:
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
