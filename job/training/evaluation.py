"""The evaluation loss: the sum over all learned tokens by their number, whatever the batches and the processes are.

transformers takes the mean of the batches' means, in which a token of a short batch counts for more than one of a long
batch, so that the same rows have another loss with another batch size.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORED = -100


class TokenLoss:
    """The sum of losses and the number of tokens of one evaluation, on the device until they are read."""

    def __init__(self, device: torch.device, *, rows: int, batch_size: int, rank: int, processes: int) -> None:
        """`rows` are those of the evaluation data, and `batch_size` those of a process's batch."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._rows, self._batch_size, self._rank, self._processes = rows, batch_size, rank, processes
        self._step = 0

    def without_copies(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch in which no row is learned that only fills up the last batches of the other processes.

        accelerate gives all processes batches of the same number and size, and takes rows from the beginning for that.
        """
        first = (self._step * self._processes + self._rank) * self._batch_size
        self._step += 1
        real = max(0, min(self._batch_size, self._rows - first))
        labels, positions = inputs["labels"], inputs.get("position_ids")
        if positions is not None and labels.shape[0] == 1:  # rows one after another
            number = (positions == 0).cumsum(dim=-1)
        else:
            number = torch.arange(1, labels.shape[0] + 1, device=labels.device)[:, None]
        if self._processes == 1 or int(number.max()) <= real:
            return inputs
        return {**inputs, "labels": labels.masked_fill(number > real, IGNORED)}

    def add(self, mean: torch.Tensor, labels: torch.Tensor) -> None:
        """A batch's mean loss. The first label of a row is never predicted."""
        count = (labels[..., 1:] != IGNORED).sum().double()
        total = torch.where(count > 0, mean.double() * count, torch.zeros_like(count))
        self._sums += torch.stack([total, count])

    def mean(self, accelerator: Any) -> float:
        """The loss in nats per token, over all processes."""
        sums = accelerator.reduce(self._sums.clone()) if self._processes > 1 else self._sums
        total, count = sums.tolist()
        return float(total / count) if count else float("nan")
