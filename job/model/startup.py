"""Faster imports of the libraries. Call this before any of them is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def import_bitsandbytes_uncompiled() -> None:
    """Import bitsandbytes without torch's compiler, which saves a tenth of a process's start.

    bitsandbytes compiles functions that are only used where it has neither GPU kernels nor its CPU library. They work
    uncompiled too.
    """
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand-in for the decorator `torch.compile`, with or without arguments, that compiles nothing."""
    return _as_it_is if function is None else function
