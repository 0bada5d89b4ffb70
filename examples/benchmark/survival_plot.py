"""A picture of what survives, by the number of re-basings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.benchmark.stores import Sums

_COLOURS = {"NF4": "tab:blue", "FP4": "tab:orange", "int8": "tab:green", "any": "black"}
_STYLES = {"nearest": "-", "stochastic": "--", "carry": "-"}


def draw(curves: Mapping[tuple[str, str], Mapping[int, Sums]], path: Path) -> None:
    """Left what survived of the sum of all increments, right its relative error.

    Args:
        curves: (format, rounding) -> re-basings so far -> their sum.
        path: file to write; its ending is the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (name, rounding), curve in curves.items():
        if name not in _COLOURS:
            continue
        label = "carry, any base" if rounding == "carry" else f"{name}, {rounding}"
        style = {"label": label, "color": _COLOURS[name], "linestyle": _STYLES[rounding]}
        left.plot(list(curve), [sums.survived for sums in curve.values()], **style)
        right.plot(list(curve), [sums.relative_error for sums in curve.values()], **style)
    left.set(title="survived: <C, D> / <D, D>", ylim=(0, 1.1))
    right.set(title="error: |C - D| / |D|", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("re-basings")
        axes.grid(alpha=0.3)
    right.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
