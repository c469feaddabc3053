"""What makes the libraries' import shorter; to be called before any of them is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def import_bitsandbytes_uncompiled() -> None:
    """Import bitsandbytes without torch's compiler, which it loads for functions of its own that are used where it has neither GPU
    kernels nor its library for CPUs: there they work uncompiled. Of a process's start that is a tenth."""
    compiler = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """`torch.compile` as a decorator, with arguments or without."""
    return _as_it_is if function is None else function
