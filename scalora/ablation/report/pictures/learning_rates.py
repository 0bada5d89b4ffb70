"""Validation loss against learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.axes import (
    add_legend,
    figure_beside_legend,
    loss_axis,
    loss_name,
)
from scalora.ablation.report.pictures.looks import Look, looks_of
from scalora.ablation.report.results import MethodResult
from scalora.ablation.statistics import Statistic
from scalora.plotting.figures import TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOM = 4.0
"""Spans of the methods' best losses that the axis has room for above them."""
_LEAST_ROOM = 0.05
"""The same, at least, as a share of the best loss."""
_LABELLED = 6
"""Learning rates that have room for a label each."""
_LINE = 10.0
"""Points between two lines of marks above the axes."""


def learning_rates(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw validation loss against learning rate.

    The axis ends above the methods' best losses, and at the loss before training at the latest. A
    triangle at the upper edge is a rate whose loss is above that, a cross one that diverged.
    """
    found = {
        result.method: {rate: one for rate, one in result.by_rate.items() if one is not None}
        for result in results
    }
    found = {method: points for method, points in found.items() if points}
    if not found:
        return None
    looks = looks_of(plan, results)
    best = {result.method: result.best for result in results}
    ceiling = _ceiling(results, found)
    figure, (axes,) = figure_beside_legend(looks)
    axes.set_xscale("log")
    rates = sorted({rate for points in found.values() for rate in points})
    axes.set_xlim(rates[0] / 1.4, rates[-1] * 1.4)
    axes.xaxis.set_major_formatter("{x:g}")
    if len(rates) <= _LABELLED:
        axes.set_xticks(rates)
        axes.set_xticks([], minor=True)
    for method, points in found.items():
        _draw_points(axes, points, looks[method], best[method], ceiling)
    means = [one.mean for points in found.values() for one in points.values()]
    inside = [loss for loss in means if loss <= ceiling]
    loss_axis(axes, inside)
    marked = _mark_outside(axes, found, looks, ceiling)
    outside = set(means) - set(inside)
    marks = "; ▲: above the axis" if any(map(math.isfinite, outside)) else ""
    marks += "" if all(map(math.isfinite, outside)) else "; ×: diverged"
    axes.set_xlabel(f"learning rate (filled: chosen{marks})")
    axes.set_ylabel(loss_name("validation", plan))
    axes.set_title("Validation loss by learning rate", pad=6 + _LINE * marked)
    add_legend(figure, axes)
    return figure


def _ceiling(
    results: Sequence[MethodResult], found: Mapping[str, Mapping[float, Statistic]]
) -> float:
    """Return the loss at which the axis ends; infinity if everything finite fits."""
    lowest = [min(one.mean for one in points.values()) for points in found.values()]
    finite = [loss for loss in lowest if math.isfinite(loss)]
    if not finite:
        return math.inf
    room = max(_ROOM * (max(finite) - min(finite)), _LEAST_ROOM * min(finite))
    starts = [result.curve[0][1] for result in results if result.curve]
    return min(max(finite) + room, max([*starts, max(finite)])) if starts else max(finite) + room


def _draw_points(
    axes: Axes,
    points: Mapping[float, Statistic],
    look: Look,
    best: float | None,
    ceiling: float,
) -> None:
    finite = {rate: one for rate, one in points.items() if math.isfinite(one.mean)}
    axes.errorbar(
        list(finite),
        [one.mean for one in finite.values()],
        yerr=[one.stderr or 0.0 for one in finite.values()],
        linestyle=look.line,
        marker=look.marker,
        markersize=6,
        markerfacecolor="white",
        markeredgewidth=1.4,
        linewidth=look.width,
        capsize=2,
        color=look.color,
        label=look.label,
        zorder=2 + look.width,
    )
    if best in finite and finite[best].mean <= ceiling:
        axes.plot(best, finite[best].mean, look.marker, color=look.color, markersize=8, zorder=9)


def _mark_outside(
    axes: Axes,
    found: Mapping[str, Mapping[float, Statistic]],
    looks: Mapping[str, Look],
    ceiling: float,
) -> int:
    """Mark what the axes do not show, one line per method; return the number of lines."""
    from matplotlib.transforms import offset_copy

    lines = 0
    for method, points in found.items():
        above = offset_copy(
            axes.get_xaxis_transform(),
            axes.get_figure(root=True),
            y=(lines + 0.5) * _LINE,
            units="points",
        )
        outside = {rate: one for rate, one in points.items() if not one.mean <= ceiling}
        for rate, one in outside.items():
            axes.plot(
                rate,
                1.0,
                "^" if math.isfinite(one.mean) else "x",
                color=looks[method].color,
                markersize=6,
                markeredgewidth=1.8,
                transform=above,
                clip_on=False,
            )
            if not math.isfinite(one.mean):
                continue
            axes.annotate(
                f"{one.mean:,.0f}" if one.mean >= 1000 else f"{one.mean:.4g}",
                (rate, 1.0),
                xycoords=above,
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=TEXT,
                annotation_clip=False,
            )
        lines += bool(outside)
    return lines
