"""Draws the loss curve as a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_loss_curve(history: Sequence[Mapping[str, Any]], title: str, file: Path) -> None:
    """Plot training and evaluation loss in nats per token by optimizer step. `history` is the trainer's log history."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    # evaluations are points: a line between them would suggest values that were not measured
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=f"{label} (last {values[-1]:.3f})", linewidth=1.5, markersize=5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)
