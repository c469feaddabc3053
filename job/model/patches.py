"""Changes to how a model computes, recorded in one object that can undo them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Patches:
    """Makes changes and records them. `undo` reverts them, the last one first.

    Replaced weights are kept only until `settle_weights`, since memory cannot hold a model's weights twice.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[bool, Callable[[], None]]] = []  # whether the change keeps weights, and how to undo it
        self._settled = False

    def replace(self, owner: torch.nn.Module, name: str, value: Any) -> None:
        """Give a module its own method or attribute, in place of its class's."""
        self._undo.append((False, _restorer(owner, name)))
        owner.__dict__[name] = value

    def replace_module(self, parent: torch.nn.Module, name: str, child: torch.nn.Module) -> None:
        """Replace a child of `parent` by another module."""
        self._exchange(parent, name, child)

    def replace_weight(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        """Give a frozen layer another weight."""
        self._exchange(layer, "weight", torch.nn.Parameter(weight, requires_grad=False))

    def on_undo(self, act: Callable[[], None]) -> None:
        """Call `act` when changes are undone."""
        self._undo.append((False, act))

    def settle_weights(self) -> None:
        """Make the replaced weights final: free the old ones, and record no more weights."""
        self._settled = True
        self._undo = [(holds, act) for holds, act in self._undo if not holds]

    def mark(self) -> int:
        """How many changes are recorded, for `undo`."""
        return len(self._undo)

    def undo(self, until: int = 0) -> None:
        """Revert the recorded changes after the first `until`."""
        while len(self._undo) > until:
            self._undo.pop()[1]()

    def _exchange(self, owner: torch.nn.Module, name: str, value: Any) -> None:
        if not self._settled:
            before = getattr(owner, name)
            self._undo.append((True, lambda: setattr(owner, name, before)))
        setattr(owner, name, value)


@contextlib.contextmanager
def replaced(owner: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within this block, a module has its own method or attribute."""
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
