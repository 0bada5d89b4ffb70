"""A picture of what survives, by the number of re-basings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scalora.plotting import new_figure, write_figure
from scalora.plotting.figures import MUTED, SERIES, style

if TYPE_CHECKING:
    from examples.benchmark.stores import Sums

_FORMATS = ("NF4", "FP4", "int8")
_ROUNDINGS = {"nearest": (SERIES[0], "-"), "stochastic": (SERIES[1], "--")}


def draw(curves: Mapping[tuple[str, str], Mapping[int, Sums]], path: Path) -> None:
    """Draw what survived of the sum of all increments, and below it its relative error.

    One column per format; behind its curves the carry's, which is the same beside any base.

    Args:
        curves: (format, rounding) -> re-basings so far -> their sum.
        path: file to write; its ending is the format.
    """
    with style():
        figure, panels = new_figure(
            7.5, 4.6, rows=2, columns=len(_FORMATS), sharex=True, sharey="row"
        )
        for column, name in enumerate(_FORMATS):
            looks = {("any", "carry"): ("carry, any base", MUTED, "-", 6.0)} | {
                (name, rounding): (f"rounded, {rounding}", color, line, 1.8)
                for rounding, (color, line) in _ROUNDINGS.items()
            }
            for key, (label, color, line, width) in looks.items():
                look = {"label": label, "color": color, "linestyle": line, "linewidth": width}
                found = curves[key]
                survived = [sums.survived for sums in found.values()]
                errors = [sums.relative_error for sums in found.values()]
                panels[0, column].plot(list(found), survived, **look)
                panels[1, column].plot(list(found), errors, **look)
            panels[0, column].set_title(name)
            panels[1, column].set_xlabel("re-basings")
        panels[0, 0].set(ylabel="share that survived", ylim=(-0.05, 1.15))
        panels[1, 0].set(ylabel="error, over the sum's norm", ylim=(0, None))
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3
        )
        write_figure(figure, path)
