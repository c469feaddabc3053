"""Everything that was changed in a model so that it computes in another way, in one object that can undo it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Patches:
    """Records each change as it makes it; `undo` takes them back, the last one first.

    Replaced weights are kept only until `settle_weights`: a model cannot hold all of its weights twice.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[bool, Callable[[], None]]] = []  # whether it holds weights, and how to undo it
        self._settled = False

    def replace(self, owner: torch.nn.Module, name: str, value: Any) -> None:
        """Give a module a method or attribute of its own, instead of its class's."""
        self._undo.append((False, _restorer(owner, name)))
        owner.__dict__[name] = value

    def replace_module(self, parent: torch.nn.Module, name: str, child: torch.nn.Module) -> None:
        """Put another module in the place of `parent`'s child."""
        self._exchange(parent, name, child)

    def replace_weight(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        """Give a frozen layer another weight."""
        self._exchange(layer, "weight", torch.nn.Parameter(weight, requires_grad=False))

    def on_undo(self, act: Callable[[], None]) -> None:
        """Call `act` when the changes are undone."""
        self._undo.append((False, act))

    def settle_weights(self) -> None:
        """The weights stay as they are now: forget those that were replaced, and record no more of them."""
        self._settled = True
        self._undo = [(holds, act) for holds, act in self._undo if not holds]

    def undo(self) -> None:
        """Take every recorded change back."""
        while self._undo:
            self._undo.pop()[1]()

    def _exchange(self, owner: torch.nn.Module, name: str, value: Any) -> None:
        if not self._settled:
            before = getattr(owner, name)
            self._undo.append((True, lambda: setattr(owner, name, before)))
        setattr(owner, name, value)


@contextlib.contextmanager
def replaced(owner: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within this block, a module has a method of its own."""
    restore = _restorer(owner, name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        restore()


def _restorer(owner: torch.nn.Module, name: str) -> Callable[[], None]:
    absent = object()
    before = owner.__dict__.get(name, absent)

    def restore() -> None:
        if before is absent:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before

    return restore
