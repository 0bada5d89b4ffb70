"""Validation loss against learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.axes import legend_beside, loss_axis, loss_name
from scalora.ablation.report.pictures.looks import Look, looks_of
from scalora.ablation.report.results import MethodResult
from scalora.ablation.statistics import Statistic
from scalora.plotting import new_figure
from scalora.plotting.figures import TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROOM = 4.0
"""Spans of the methods' best losses that the axis has room for above them."""
_LEAST_ROOM = 0.02
"""The same, at least, as a share of the best loss."""
_UPRIGHT = 5
"""Learning rates whose labels have room beside each other."""
_LINE = 0.05
"""Height of a line of marks at the upper edge, as a share of the axes' height."""


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
    figure, panels = new_figure(6.1, 3.5)
    axes: Axes = panels[0, 0]
    axes.set_xscale("log")
    rates = sorted({rate for points in found.values() for rate in points})
    axes.set_xlim(rates[0] / 1.4, rates[-1] * 1.4)
    axes.set_xticks(
        rates, [f"{rate:g}" for rate in rates], rotation=40 if len(rates) > _UPRIGHT else 0
    )
    axes.set_xticks([], minor=True)
    for method, points in found.items():
        _draw_points(axes, points, looks[method], best[method], ceiling)
    inside = [one.mean for points in found.values() for one in points.values()]
    loss_axis(axes, [loss for loss in inside if loss <= ceiling])
    marked = _mark_outside(axes, found, looks, ceiling)
    outside = "; ▲: above the axis; ×: diverged" if marked else ""
    axes.set_xlabel(f"learning rate (filled: chosen{outside})")
    axes.set_ylabel(loss_name("validation", plan))
    axes.set_title("Validation loss by learning rate", pad=6 + 10 * marked)
    legend_beside(figure, axes)
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
    lines = 0
    for method, points in found.items():
        height = 1.03 + _LINE * lines
        outside = {rate: one for rate, one in points.items() if not one.mean <= ceiling}
        for rate, one in outside.items():
            axes.plot(
                rate,
                height,
                "^" if math.isfinite(one.mean) else "x",
                color=looks[method].color,
                markersize=6,
                markeredgewidth=1.8,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            axes.annotate(
                _written(one.mean),
                (rate, height),
                xycoords=axes.get_xaxis_transform(),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=TEXT,
                annotation_clip=False,
            )
        lines += bool(outside)
    return lines


def _written(loss: float) -> str:
    if not math.isfinite(loss):
        return "diverged"
    return f"{loss:,.0f}" if loss >= 1000 else f"{loss:.4g}"
