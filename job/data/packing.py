"""Packs several short rows into one full-length row, so that batches need no padding."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np

TOGETHER = 1000  # rows that are packed at a time, which bounds memory


def bins(lengths: np.ndarray[Any, Any], max_length: int) -> list[list[int]]:
    """Indices of rows that together have at most `max_length` tokens, by best-fit decreasing.

    Ding et al. 2024, arXiv:2404.10830. Gives the bins of `trl.pack_dataset`. No length may exceed `max_length`.
    """
    order = np.argsort(-lengths, kind="stable")
    found: list[list[int]] = []
    with_room: defaultdict[int, deque[list[int]]] = defaultdict(deque)
    rooms = 0  # bit n: there is a bin with room for exactly n tokens
    for index in order.tolist():
        length = int(lengths[index])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].popleft()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = max_length, []
            found.append(chosen)
        chosen.append(index)
        left = room - length
        if left > 0:
            with_room[left].append(chosen)
            rooms |= 1 << left
    return found
