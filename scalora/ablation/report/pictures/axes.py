"""Axes of losses, and legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 8.0
"""Ratio of the largest to the smallest loss beyond which an axis is logarithmic."""
_MARGIN = 0.06
_LONG_LEGEND = 18


def loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Make the vertical axis fit these losses; logarithmic where they are far apart."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    if is_wide(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        margin = (high / low) ** _MARGIN
        axes.set_ylim(low / margin, high * margin)
        return
    margin = _MARGIN * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def is_wide(losses: Sequence[float]) -> bool:
    """Return whether losses are positive and so far apart that their axis is logarithmic."""
    return bool(losses) and 0 < _WIDE * min(losses) < max(losses)


def loss_name(split: str, plan: TaskPlan, score: str = "loss") -> str:
    """Return the name of an axis of scores, and which end of it is better."""
    better = "lower" if score == "loss" or plan.lower_is_better else "higher"
    return f"{split} {score} ({better} is better)"


def legend_beside(figure: Figure, axes: Axes) -> None:
    """Put the legend of these axes to the right of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        ncols=1 + len(labels) // _LONG_LEGEND,
        handlelength=2.4,
        labelspacing=0.7,
    )
