"""The optimizers, schedules and SFTConfig arguments that transformers and trl know.

They are read from the packages' source, since importing them would take seconds and load torch. What would only fail
when training starts, after the model is downloaded, is found here.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

from pydantic import TypeAdapter, ValidationError

from job.errors import SettingsError
from job.settings import Settings, variable

# SFTConfig arguments that the job sets itself. Overriding them would break resume, the store or the merge verification.
_OWNED = {
    "output_dir", "run_name", "resume_from_checkpoint", "report_to", "save_strategy", "save_total_limit", "save_only_model",
    "load_best_model_at_end", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "use_cpu", "deepspeed", "fsdp",
    "fsdp_config", "model_init_kwargs", "trust_remote_code", "dataset_kwargs", "dataset_text_field", "max_length",
    "remove_unused_columns", "ignore_data_skip", "data_seed", "disable_tqdm", "logging_dir", "eval_strategy", "do_train",
    "chat_template_path", "eos_token", "pad_token", "padding_free", "packing_strategy", "eval_packing", "eval_on_start",
}  # fmt: skip

# Optimizers that need a package of their own (or hardware that the job does not run on), by the start of their names.
_NEEDS_PACKAGE = {
    "galore_": "galore_torch", "apollo_": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim", "grokadamw": "grokadamw",
    "schedule_free_": "schedulefree", "stable_adamw": "optimi", "adamw_anyprecision": "torchdistx", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao", "adamw_torch_xla": "torch_xla", "adamw_torch_npu": "torch_npu",
}  # fmt: skip

# Schedules that need one of these keys in lr_scheduler_kwargs.
_NEEDS_KEYS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
_NEEDS_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")

# Arguments whose value has bounds that only the optimizer or the data loader checks: (least, most, whether most is allowed).
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "adam_beta1": (0, 1, False), "adam_beta2": (0, 1, False), "adam_epsilon": (0, 1, True), "label_smoothing_factor": (0, 1, False),
    "dataloader_num_workers": (0, 512, True), "dataloader_prefetch_factor": (1, 4096, True), "neftune_noise_alpha": (0, 1000, True),
}  # fmt: skip


def problems_of(settings: Settings) -> list[str]:
    """One line for each optimizer, schedule or SFTConfig argument that training could not use."""
    return [*_bad_optimizer(settings), *_bad_schedule(settings), *_bad_extras(settings.extra_training_args)]


def _bad_optimizer(settings: Settings) -> list[str]:
    name = settings.optim
    if name == Settings.model_fields["optim"].default:
        return []
    known = _enum_values("training_args.py", "OptimizerNames")
    if name not in known:
        return [_unknown("optim", name, known)]
    package = next((needed for start, needed in _NEEDS_PACKAGE.items() if name.startswith(start)), None)
    if package is not None and importlib.util.find_spec(package) is None:
        return [
            f"FT_OPTIM={name!r} needs the package {package}, which is not installed: use adamw_torch or a paged_ one."
        ]
    return []


def _bad_schedule(settings: Settings) -> list[str]:
    name = settings.lr_scheduler_type
    if name == Settings.model_fields["lr_scheduler_type"].default:
        return []
    known = _enum_values("trainer_utils.py", "SchedulerType")
    if name not in known:
        return [_unknown("lr_scheduler_type", name, known)]
    given = settings.extra_training_args.get("lr_scheduler_kwargs")
    keys = _NEEDS_KEYS.get(name)
    if keys is not None and not (isinstance(given, dict) and set(keys) & given.keys()):
        example = f'{{"lr_scheduler_kwargs": {{"{keys[0]}": …}}}}'
        return [f"FT_LR_SCHEDULER_TYPE={name!r} needs {' or '.join(keys)}: set FT_EXTRA_TRAINING_ARGS='{example}'."]
    if name in _NEEDS_EVALUATIONS and settings.eval_steps is None:
        return [f"FT_LR_SCHEDULER_TYPE={name!r} follows the evaluation loss: set FT_EVAL_STEPS and FT_EVAL_SPLIT too."]
    return []


def _unknown(field_name: str, value: str, known: Sequence[str]) -> str:
    likely = [name for name in known if name.startswith(value.lower())] or difflib.get_close_matches(
        value, known, 1, 0.3
    )
    hint = f"unknown. Did you mean {likely[0]}? It " if likely else ""
    return f"{variable(field_name)}={value!r}: {hint}must be one of {', '.join(known)}."


def _bad_extras(arguments: Mapping[str, Any]) -> list[str]:
    if not arguments:
        return []
    known = _annotations()
    covered = {name: variable(name) for name in Settings.model_fields}
    covered |= dict.fromkeys(("max_seq_length", "max_length"), "FT_MAX_SEQ_LENGTH") | {
        "warmup_steps": "FT_WARMUP_RATIO"
    }
    problems = []
    for name, value in arguments.items():
        where = f"FT_EXTRA_TRAINING_ARGS: {name!r}"
        if name in covered:
            problems.append(f"{where} has its own variable: set {covered[name]}.")
        elif name in _OWNED:
            problems.append(f"{where} is decided by the job and cannot be set.")
        elif name not in known:
            near = difflib.get_close_matches(name, sorted(known.keys() - _OWNED), n=1, cutoff=0.5)
            problems.append(
                f"{where} is not an argument of SFTConfig." + (f" Did you mean {near[0]!r}?" if near else "")
            )
        elif (wanted := _mismatch(name, value, known[name])) is not None:
            problems.append(f"{where} is {value!r}: must be {wanted}.")
    return problems


def _mismatch(name: str, value: Any, annotation: str) -> str | None:
    """What the argument must be, if `value` is not that; None if it may be, or nobody can tell."""
    try:
        kind = eval(annotation, {"__builtins__": {}, "Union": Union, "Any": Any, **_TYPES})  # noqa: S307 (trl's own source)
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return annotation.replace("NoneType", "null").replace("None", "null")
    except Exception:  # an annotation that is more than plain types
        return None
    if name in _BOUNDS and isinstance(value, int | float):
        least, most, inclusive = _BOUNDS[name]
        if not (least <= value <= most if inclusive else least <= value < most):
            return f"at least {least:g} and {'at most' if inclusive else 'less than'} {most:g}"
    return None


_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "list": list, "tuple": tuple}


def _annotations() -> dict[str, str]:
    """The arguments of trl's SFTConfig and their types, as its source has them."""
    body = [
        *_class_body("transformers", "training_args.py", "TrainingArguments"),
        *_class_body("trl", "trainer/base_config.py", "_BaseConfig"),
        *_class_body("trl", "trainer/sft_config.py", "SFTConfig"),
    ]
    fields = [item for item in body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    named = {item.target.id: ast.unparse(item.annotation) for item in fields if isinstance(item.target, ast.Name)}
    return {name: annotation for name, annotation in named.items() if not name.startswith("_")}


def _enum_values(module: str, class_name: str) -> list[str]:
    body = _class_body("transformers", module, class_name)
    return [ast.literal_eval(item.value) for item in body if isinstance(item, ast.Assign)]


def _class_body(package: str, module: str, class_name: str) -> list[ast.stmt]:
    """The statements of one class, parsed from the package's source."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise SettingsError(f"The package {package!r} is not installed.", "Install it: pip install -r requirements.txt")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / module).read_text(encoding="utf-8"))
    return [
        item for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name for item in node.body
    ]
