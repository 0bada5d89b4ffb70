"""Validation loss against steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.axes import (
    add_legend,
    figure_beside_legend,
    is_wide,
    loss_axis,
    loss_name,
)
from scalora.ablation.report.pictures.looks import Look, looks_of
from scalora.ablation.report.results import MethodResult
from scalora.plotting.figures import LORA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EARLY = 0.1
"""Share of the steps that the axis of losses makes no room for: losses fall from far above."""


def learning_curves(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw validation loss against steps, and beside it the difference from LoRA at each step.

    Where losses are orders of magnitude apart, their axis is logarithmic and tells them apart; then
    there is no second panel.
    """
    shown = [result for result in results if result.curve]
    if not shown:
        return None
    looks = looks_of(plan, results)
    compared = [result for result in shown if len(result.curve_difference) > 1]
    if is_wide(_late(plan, shown)):
        compared = []
    figure, panels = figure_beside_legend(looks, panels=2 if compared else 1)
    for result in shown:
        _draw_curve(panels[0], result.curve, looks[result.method])
    loss_axis(panels[0], _late(plan, shown))
    panels[0].set_ylabel(loss_name("validation", plan))
    panels[0].set_title("Validation loss, each at its best learning rate")
    if compared:
        _draw_differences(panels[1], plan, compared, looks)
    for axes in panels:
        axes.set_xlabel("step")
        axes.set_xlim(0, plan.steps)
    add_legend(figure, panels[0])
    return figure


def _draw_curve(axes: Axes, curve: Sequence[tuple[int, float, float | None]], look: Look) -> None:
    steps = [step for step, _, _ in curve]
    means = [mean for _, mean, _ in curve]
    errors = [error or 0.0 for _, _, error in curve]
    # A run that diverged at once has one point.
    marker = look.marker if len(steps) == 1 else None
    axes.plot(
        steps,
        means,
        linestyle=look.line,
        color=look.color,
        marker=marker,
        linewidth=look.width,
        label=look.label,
        zorder=2 + look.width,
    )
    low = [mean - error for mean, error in zip(means, errors, strict=True)]
    high = [mean + error for mean, error in zip(means, errors, strict=True)]
    axes.fill_between(steps, low, high, color=look.color, alpha=0.18, linewidth=0)


def _late(plan: TaskPlan, shown: Sequence[MethodResult]) -> list[float]:
    """Return the losses after the first steps, or all if there are no others."""
    late = [
        mean
        for result in shown
        for step, mean, _ in result.curve
        if step >= _EARLY * plan.steps or len(result.curve) == 1
    ]
    return late or [mean for result in shown for _, mean, _ in result.curve]


def _draw_differences(
    axes: Axes, plan: TaskPlan, compared: Sequence[MethodResult], looks: dict[str, Look]
) -> None:
    """Draw each method's difference from LoRA, from where the axis of losses begins."""
    axes.axhline(0, color=LORA, linewidth=2.2)
    for result in compared:
        late = [point for point in result.curve_difference if point[0] >= _EARLY * plan.steps]
        _draw_curve(axes, late, looks[result.method])
    axes.set_title("Difference from LoRA, same seed and step")
    axes.set_ylabel("validation loss − LoRA's")
