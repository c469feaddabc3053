"""Fetches models and datasets and publishes models: the Hugging Face Hub, local folders and S3 prefixes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from job.errors import InputError, JobError, PermissionRefused, SettingsError, TransientError

_T = TypeVar("_T")
_PAUSES_SECONDS = (1.0, 3.0, 8.0, 20.0)
_LONGEST_PAUSE_SECONDS = 60.0
_FINAL = (400, 413, 422)  # of the Hub's own API. Storage services also answer 400 to a connection that stalls


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Translate huggingface_hub's errors into the job's. `what` names the repository and the variable that chose it."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        explained = _explained(error, what)
        if explained is None:
            raise
        raise explained from error


def patiently(ask: Callable[[], _T]) -> _T:
    """Ask the Hub again after answers that ask for patience: 429, 5xx, and no answer at all. Two minutes at most.

    The Hub's own wish, Retry-After (RFC 9110, 10.2.3), counts if it is short.
    """
    for pause in _PAUSES_SECONDS:
        try:
            return ask()
        except Exception as error:
            if not is_outage(error):
                raise
            time.sleep(min(_wished(error) or pause, _LONGEST_PAUSE_SECONDS))
    return ask()


def is_outage(error: BaseException) -> bool:
    """Whether the Hub could not be asked, or asks for patience. Another try may succeed."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return is_outage(error.__cause__)
    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 425, 429) or _status(error) >= 500
    if isinstance(error, json.JSONDecodeError):
        return True  # the page of a proxy, or of an outage, instead of an answer
    return _is_lost_connection(error)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether the network failed, as Python or a version of the Hub's HTTP client says it: httpx, httpx2, requests."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(
        ("httpx", "httpcore", "requests")
    )


def _wished(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


def _explained(error: Exception, what: str) -> JobError | None:
    if isinstance(error, GatedRepoError):
        return PermissionRefused(
            f"{what} is gated.", "Accept its license on its Hub page, and set HF_TOKEN to a token of the same account."
        )
    if isinstance(error, RepositoryNotFoundError) and _status(error) != 403:
        return SettingsError(
            f"{what} does not exist on the Hub, or is private.",
            "Check the spelling. For a private repository, set HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return SettingsError(f"{what} has no such revision.", "Check the part after the @.")
    if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
        # huggingface_hub raises this when the request for an uncached file fails
        cause = error.__cause__
        explained = _explained(cause, what) if isinstance(cause, Exception) else None
        return explained or TransientError(f"The Hub did not deliver {what}: {error}", "Start the job again.")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return SettingsError(
            f"{what} is not in the local cache, and the Hub could not be reached.",
            "Unset HF_HUB_OFFLINE, check the network and HF_ENDPOINT, or name a local folder.",
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"{what} is missing a file: {error}", "Check that the repository is complete.")
    if isinstance(error, HFValidationError):
        return SettingsError(f"{what} is not a valid Hub id.", "Write it as user/name or user/name@revision.")
    if isinstance(error, HfHubHTTPError):
        status = _status(error)
        words = f": {said}" if (said := _words(error)) else "."
        if status in (401, 403):
            way_out = "Check that HF_TOKEN is valid and grants access."
            if re.search(r"storage|quota|limit|billing|payment", words, re.IGNORECASE):
                way_out = "Free storage on the Hub, let the account have more, or set FT_HUB_PRIVATE=false if private storage is what ran out."
            return PermissionRefused(f"The Hub refused {what} ({status}){words}", way_out)
        if status in _FINAL and "/api/" in str(error.response.request.url):
            return SettingsError(
                f"The Hub refused {what} ({status}){words}", "Change what it names. Another start would be refused too."
            )
        return TransientError(f"The Hub answered {status} for {what}{words}", "Start the job again later.")
    if isinstance(error, RuntimeError) and "CAS" in str(error):  # hf_xet, out of retries
        return TransientError(f"The Hub's storage failed for {what}: {error}", "Start the job again.")
    if _is_lost_connection(error) or isinstance(error, json.JSONDecodeError):
        return TransientError(
            f"The Hub cannot be reached for {what}: {type(error).__name__}.",
            "Check the network and HF_ENDPOINT, then start again.",
        )
    return None


def _words(error: HfHubHTTPError) -> str:
    """What the Hub itself said, in a line."""
    return " ".join(str(getattr(error, "server_message", None) or "").split())[:300]


def _status(error: HfHubHTTPError) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0) or 0)
