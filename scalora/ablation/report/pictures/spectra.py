"""The spectrum of the change, one panel per method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.looks import adapter_rank, looks_of
from scalora.ablation.report.results import MethodResult
from scalora.plotting import new_figure
from scalora.plotting.figures import MUTED
from scalora.plotting.spectra import ROUNDING, mark_rank, spectrum_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_MANY = 40  # singular values, beyond which dots run into each other


def spectra(plan: TaskPlan, results: Sequence[MethodResult]) -> Figure | None:
    """Draw each method's singular values over the largest, mean of the layers.

    One panel per method, the others' in grey behind, so that none hides another.
    """
    shown = {
        result.method: [value for value in result.spectrum if value > ROUNDING]
        for result in results
        if result.spectrum
    }
    if not shown:
        return None
    looks = looks_of(plan, results)
    columns = min(_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = new_figure(
        1.0 + 2.2 * columns, 0.6 + 2.3 * lines, lines, columns, sharex=True, sharey=True
    )
    for axes, (method, values) in zip(panels.flat, shown.items(), strict=False):
        for other in shown.values():
            axes.plot(range(1, len(other) + 1), other, color=MUTED, linewidth=1.2, zorder=2)
        look = looks[method]
        axes.plot(
            range(1, len(values) + 1),
            values,
            "o-",
            color=look.color,
            markersize=3.0 if len(values) < _MANY else 1.5,
            linewidth=2.0,
            zorder=3,
        )
        spectrum_axes(axes)
        mark_rank(axes, adapter_rank(method, plan.rank) or plan.rank)
        axes.set_title(look.label.replace("\n   ", "\n"), fontsize=9)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    grey = " (grey: the other methods)" if len(shown) > 1 else ""
    figure.supxlabel(f"singular value of the change, from the largest{grey}", fontsize=9)
    figure.supylabel("relative to the largest", fontsize=9)
    return figure
