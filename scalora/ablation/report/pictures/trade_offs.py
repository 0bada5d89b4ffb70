"""Scores against what they cost: forgetting, trainable parameters, bytes of training state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.axes import (
    add_legend,
    figure_beside_legend,
    loss_axis,
    loss_name,
)
from scalora.ablation.report.pictures.looks import Look, adapter_rank, looks_of, lora_rank
from scalora.ablation.report.results import MethodResult
from scalora.ablation.statistics import Statistic
from scalora.plotting.figures import LORA, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MARGIN = 0.1
"""Share of the axis of costs, as of its logarithm, that is left free at an end."""
_NARROW = 300.0
"""Ratio of costs up to which the axis has more ticks than one per power of ten."""
_LONG = 1e5
"""Cost from which labels are as short as 200k."""
_VISIBLE = 1.3
"""Ratio of costs that an arrow is drawn for."""


class _Point(NamedTuple):
    method: str
    x: Statistic
    y: Statistic


def learning_and_forgetting(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw what was forgotten against what was learned; None if the task knows no source.

    LoRA's ranks are joined: the curve is what plain LoRA can trade of one for the other.
    """
    points = _points(results, lambda result: result.test.get(plan.metric), _forgetting)
    if not points:
        return None
    looks = looks_of(plan, results)
    figure, (axes,) = figure_beside_legend(looks)
    _draw(axes, plan, looks, points)
    better = "left" if plan.lower_is_better else "right"
    axes.margins(0.12)
    axes.set_xlabel(loss_name("learning: test", plan, plan.metric))
    axes.set_ylabel("forgetting: source loss, after − before\n(lower is better)")
    axes.set_title(f"Learning against forgetting; lower {better} is better")
    add_legend(figure, axes)
    return figure


def score_against_parameters(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw the test score against the number of trainable parameters; None if all have one."""
    return _score_against(
        plan, results, lambda result: result.trainable_parameters, "trainable parameters"
    )


def score_against_state(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw the test score against the bytes of training state; None: not all records have them."""

    def kibibytes(result: MethodResult) -> Statistic | None:
        found = result.state_bytes
        return None if found is None else Statistic(found.mean / 1024, None, found.n)

    if any(result.test.get(plan.metric) and not result.state_bytes for result in results):
        return None
    return _score_against(
        plan, results, kibibytes, "training state, KiB (adapter, carry, gradients, optimizer)"
    )


def _score_against(
    plan: TaskPlan,
    results: Sequence[MethodResult],
    cost: Callable[[MethodResult], Statistic | None],
    name: str,
) -> Figure | None:
    points = _points(results, cost, lambda result: result.test.get(plan.metric))
    if len({point.x.mean for point in points}) < 2:
        return None
    looks = looks_of(plan, results)
    figure, (axes,) = figure_beside_legend(looks)
    _cost_axis(axes, [point.x.mean for point in points])
    errors = [(point.y.mean, point.y.stderr or 0.0) for point in points]
    loss_axis(axes, [mean + sign * error for mean, error in errors for sign in (-1, 1)])
    _draw(axes, plan, looks, points)
    _mark_worth(axes, plan, points)
    axes.set_xlabel(name)
    axes.set_ylabel(loss_name("test", plan, plan.metric))
    axes.set_title(f"Test {plan.metric} against {name.partition(',')[0]}")
    add_legend(figure, axes)
    return figure


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with room for labels beside the last point."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    low, high = min(costs), max(costs)
    room = max(high / low, 2.0) ** _MARGIN
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room**1.6)
    narrow = high < _NARROW * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if high > _LONG else "{x:,.0f}")


def _points(
    results: Sequence[MethodResult],
    x: Callable[[MethodResult], Statistic | None],
    y: Callable[[MethodResult], Statistic | None],
) -> list[_Point]:
    """Return the points of the methods that have both numbers, finite."""
    points = []
    for result in results:
        across, up = x(result), y(result)
        if across is None or up is None or not math.isfinite(across.mean + up.mean):
            continue
        points.append(_Point(result.method, across, up))
    return points


def _forgetting(result: MethodResult) -> Statistic | None:
    return result.forgetting


def _lora_points(plan: TaskPlan, points: Sequence[_Point]) -> list[_Point]:
    """Return plain LoRA's points, from the lowest rank to the highest."""
    ranks = {point.method: lora_rank(point.method, plan.rank) for point in points}
    lora = [point for point in points if ranks[point.method] is not None]
    return sorted(lora, key=lambda point: ranks[point.method] or 0)


def _draw(axes: Axes, plan: TaskPlan, looks: Mapping[str, Look], points: Sequence[_Point]) -> None:
    """Draw LoRA's ranks as a curve and every method as a point with its errors."""
    lora = _lora_points(plan, points)
    if len(lora) > 1:
        axes.plot(
            [point.x.mean for point in lora],
            [point.y.mean for point in lora],
            "o-",
            color=LORA,
            linewidth=2.2,
            zorder=2,
            label="LoRA, by rank",
        )
    for point in points:
        in_curve = len(lora) > 1 and point in lora
        _draw_point(axes, point, looks[point.method], named=not in_curve)
        if in_curve:  # the others' ranks are in the legend
            axes.annotate(
                f"r = {adapter_rank(point.method, plan.rank)}",
                (point.x.mean, point.y.mean),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=8,
                color=looks[point.method].color,
            )


def _draw_point(axes: Axes, point: _Point, look: Look, named: bool) -> None:
    axes.errorbar(
        point.x.mean,
        point.y.mean,
        xerr=point.x.stderr or None,
        yerr=point.y.stderr or None,
        fmt=look.marker,
        color=look.color,
        markersize=11 if look.marker in "*P" else 7.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        elinewidth=1.0,
        capsize=2.5,
        label=look.label if named else None,
        zorder=3,
    )


def _mark_worth(axes: Axes, plan: TaskPlan, points: Sequence[_Point]) -> None:
    """Draw a line from ScaLoRA to the place on LoRA's curve with the same score."""
    ours = next((point for point in points if point.method == "scalora"), None)
    curve = [(point.x.mean, point.y.mean) for point in _lora_points(plan, points)]
    if ours is None:
        return
    place = cost_of(curve, ours.y.mean)
    if place is None or place < _VISIBLE * ours.x.mean:
        return
    axes.annotate(
        "",
        (place, ours.y.mean),
        (ours.x.mean, ours.y.mean),
        arrowprops={"arrowstyle": "->", "color": TEXT, "linewidth": 1.0, "shrinkA": 6},
    )
    axes.annotate(
        f"LoRA: × {place / ours.x.mean:.1f}",
        (place, ours.y.mean),
        xytext=(-2, -10),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=TEXT,
    )


def cost_of(curve: Sequence[tuple[float, float]], score: float) -> float | None:
    """Return the cost at which a curve first has a score; None: nowhere.

    Between two points the curve is a straight line over the logarithm of the cost.

    Args:
        curve: (cost, score), costs ascending.
        score: the score to find.
    """
    for (cost, one), (higher, other) in itertools.pairwise(curve):
        if one != other and min(one, other) <= score <= max(one, other):
            share = (score - one) / (other - one)
            return cost * (higher / cost) ** share
    return None
