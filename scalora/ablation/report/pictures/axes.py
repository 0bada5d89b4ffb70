"""Axes of losses, and legends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.looks import Look
from scalora.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDE = 8.0
"""Ratio of the largest to the smallest loss beyond which an axis is logarithmic."""
_LABELLED = 300.0
"""The same ratio up to which 2 and 5 of each power of ten have labels."""
_MARGIN = 0.09
_LONG_LEGEND = 24
"""Entries of a legend per column."""
_PANEL, _LINE, _LETTER = 4.3, 0.17, 0.074
"""Inches of a panel's width, of a legend's line and of a letter."""


def loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Make the vertical axis fit these losses; logarithmic where they are far apart."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return
    low, high = min(finite), max(finite)
    if is_wide(finite):
        from matplotlib.ticker import LogLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}" if high < _LABELLED * low else "")
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


def figure_beside_legend(
    looks: Mapping[str, Look], panels: int = 1, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """Return a figure with room for a legend at its right, and its axes.

    Args:
        looks: those that the legend will have.
        panels: number of panels beside each other, all of one size.
        height: least height, inches.
    """
    labels = [look.label.split("\n") for look in looks.values()]
    columns = _legend_columns(len(labels))
    lines = sum(len(label) for label in labels) + 0.4 * len(labels)
    longest = max(len(line) for label in labels for line in label)
    figure, axes = new_figure(
        _PANEL * panels + columns * (0.55 + _LETTER * longest),
        max(height, _LINE * lines / columns),
        columns=panels,
    )
    return figure, list(axes[0])


def add_legend(figure: Figure, axes: Axes) -> None:
    """Put the legend of these axes to the right of the figure's panels; without bars of errors."""
    from matplotlib.container import ErrorbarContainer

    handles, labels = axes.get_legend_handles_labels()
    handles = [h.lines[0] if isinstance(h, ErrorbarContainer) else h for h in handles]
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        ncols=_legend_columns(len(labels)),
        handlelength=2.4,
        labelspacing=0.7,
    )


def _legend_columns(entries: int) -> int:
    return 1 + (entries - 1) // _LONG_LEGEND
