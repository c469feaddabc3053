"""Which environment variables are secrets, and what of the environment a stage's process may see.

Names that the ecosystem chose are known. Of all others, a variable counts as a secret unless it is known to be harmless:
a Kubernetes Secret may hold anything under any name, and `envFrom` puts all of it into the environment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote, urlsplit

HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
WANDB = ("WANDB_API_KEY",)
KNOWN = (*HUB, *AWS, *WANDB)  # what the job itself uses

# How boto3 finds credentials that are not in the variables above. They go where the AWS secrets go.
_AWS_SOURCES = (
    "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)  # fmt: skip

# Harmless by name, and of use to a stage: the system, proxies and certificates, CUDA and the libraries, the schedulers.
_HARMLESS = re.compile(
    r"(?:PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_\w+|TZ|TERM|COLUMNS|LINES|TMPDIR|TEMP|TMP|PWD|HOSTNAME|CC|CXX"
    r"|LD_LIBRARY_PATH|LD_PRELOAD|PYTHON\w+|VIRTUAL_ENV|XDG_\w+|MPL\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|(?:HTTP|HTTPS|ALL|NO)_PROXY|CUDA_\w+|NVIDIA_\w+|NCCL_\w+|GLOO_\w+|TORCH\w*|PYTORCH_\w+|TRITON_\w+|OMP_\w+|MKL_\w+"
    r"|OPENBLAS_\w+|KMP_\w+|GOMP_\w+|NUMEXPR_\w+|MALLOC_\w+|BNB_\w+|BITSANDBYTES_\w+|ACCELERATE_\w+|TOKENIZERS_\w+|TRANSFORMERS_\w+"
    r"|DATASETS_\w+|SAFETENSORS_\w+|HF_\w+|HUGGINGFACE_\w+|FT_\w+|JOB_\w+|SLURM\w*|SLURMD_\w+|PMIX?_\w+|AWS_(?:DEFAULT_)?REGION"
    r"|AWS_ENDPOINT_URL\w*|AWS_\w*(?:CHECKSUM|RETRY|MAX_ATTEMPTS|METADATA|CA_BUNDLE|DUALSTACK|FIPS)\w*|WANDB_\w+"
    r"|UCX_\w+|FI_\w+|OFI_\w+|IBV_\w+|RDMAV_\w+|CI|SHLVL|_|OLDPWD|DEBIAN_FRONTEND|TORTURE_POINT)",
    re.IGNORECASE,
)
# What a secret is usually called, whatever its prefix says. A path to one is none.
_SECRET = re.compile(
    r"TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)?\b|PASSWORD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_PAT$|_PW$|_PWD$|_PASS$"
    r"|_JWT|JWT_|^JWT$|_AUTH|COOKIE|SIGNATURE|_DSN$",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(
    r"TOKENIZERS?_\w+|(?!HF_TOKENS|HUGGING)\w+_(?:FILE|PATH|DIR|URI|URL|SECONDS|TOKENS)|FT_\w+|JOB_RDZV_\w+|HF_TOKEN_PATH|AWS_ENDPOINT_URL\w*|SSH_AUTH_SOCK",
    re.IGNORECASE,
)
_LEAST_KNOWN, _LEAST_UNKNOWN = 4, 8  # characters of a value that is masked
# Words of the job's own log that a harmless variable of an unknown name may well hold.
_OWN_WORDS = frozenset(
    "preflight download prepare training evaluation finetune finetuning production development kubernetes container "
    "localhost 127.0.0.1 disabled enabled".split()
)
# Fields of a log line that are the job's own words, never a secret.
_OWN_FIELDS = frozenset({"time", "level", "run_id", "event", "stage", "unit", "result", "exit_code", "retry"})


def tidy(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Drop blanks and line breaks around the known secrets, as `echo … | base64` leaves them. Returns the unusable ones.

    They are sent in HTTP headers, which hold printable ASCII.
    """
    unusable = []
    for name in KNOWN:
        if name in environ:
            value = environ[name].strip()
            if value != environ[name]:
                environ[name] = value
            if not (value.isascii() and value.isprintable()):
                unusable.append(name)
    return unusable


def is_secret(name: str) -> bool:
    """Whether a variable of this name counts as a secret. One that is not known to be harmless does."""
    if name in KNOWN or _HARMLESS.fullmatch(name) is None:
        return True
    return _SECRET.search(name) is not None and _NOT_SECRET.fullmatch(name) is None


def visible_to(environ: Mapping[str, str], secrets: Iterable[str]) -> dict[str, str]:
    """The variables that a stage's process may see: the harmless ones, and of the secrets those named."""
    allowed = set(secrets)
    if allowed & set(AWS):
        allowed |= set(_AWS_SOURCES)
    return {name: value for name, value in environ.items() if name in allowed or not is_secret(name)}


def secret_values(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Every text to mask, longest first, so that masking one never leaves the tail of another.

    A secret is masked as it is and as it looks in JSON and in a URL, and each long line of one that has several. Of a URL
    with a user in it, the user and the password are masked.
    """
    found: set[str] = set()
    for name, value in environ.items():
        if is_secret(name):
            called_so = name in KNOWN or _SECRET.search(name) is not None
            if len(value) >= (_LEAST_KNOWN if called_so else _LEAST_UNKNOWN) and value.lower() not in _OWN_WORDS:
                found |= _shapes(value)
        elif "@" in value and "://" in value:
            found |= _credentials(value)
    return tuple(sorted(found, key=len, reverse=True))


def _shapes(value: str) -> set[str]:
    shapes = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], quote(value, safe="")}
    lines = value.splitlines()
    if len(lines) > 1:
        shapes |= {line.strip() for line in lines if len(line.strip()) >= 16}
    return {shape for shape in shapes if shape}


def keys_in(url: str) -> str | None:
    """The `KEY:SECRET` before the `@` of a URL, if there is one. A secret key of AWS may have slashes, which RFC 3986 does not allow."""
    found = re.search(r"\w://([^\s,@]+:[^\s,@]+)@", url)
    return found[1] if found is not None else None


def _credentials(url: str) -> set[str]:
    try:
        user, password = urlsplit(url).username, urlsplit(url).password
    except ValueError:
        return set()
    if not user and (keys := keys_in(url)) is not None:
        user, _, password = keys.partition(":")
    both = f"{user}:{password}" if password else user
    return _shapes(both) | (_shapes(password) if password and len(password) >= 4 else set()) if both else set()


def masked(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret replaced by asterisks."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def masked_fields(value: Any, secrets: tuple[str, ...]) -> Any:
    """A log line's fields with every text in them masked; names of fields and the job's own words stay."""
    if isinstance(value, str):
        return masked(value, secrets)
    if isinstance(value, dict):
        return {name: item if name in _OWN_FIELDS else masked_fields(item, secrets) for name, item in value.items()}
    return [masked_fields(item, secrets) for item in value] if isinstance(value, list | tuple) else value
