"""The picture of a report: blocks against kinds of module, and lines over steps."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miub.report.module_kinds import Place
from miub.report.rows import LayerRow, LayerRows
from scalora.plotting import encoded, new_figure
from scalora.plotting.figures import SCALE, SERIES, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELLS_WITH_NUMBERS = 120  # the most that have room for them
_UNMEASURED = "#eeeeee"


def picture(report: LayerRows, path: str | os.PathLike[str]) -> bytes:
    """Return the picture in the format that the path's suffix names, png without one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    return encoded(figure(report), Path(path).suffix[1:].lower() or "png")


def figure(report: LayerRows) -> Figure:
    """Return a row of panels per adapter: a heat map, and lines where there are several steps.

    Adapters with different numbers of coordinates have colour scales of their own, and a layer's
    line holds the steps at which it had as many coordinates as at the newest.
    """
    with style():
        return _figure(report)


def _figure(report: LayerRows) -> Figure:
    rows = {
        adapter: [row for row in report if row.adapter == adapter] for adapter in report.adapters
    }
    maps = {adapter: heat_map(own, report.places) for adapter, own in rows.items()}
    over_time = any(len(history) > 1 for history in report.history.values())
    widths = [2.4 + 0.55 * max(len(cells.kinds) for cells in maps.values())]
    if over_time:
        widths.append(5.8)
    height = min(12.0, max(3.6, 2.2 + 0.26 * max(len(cells.blocks) for cells in maps.values())))
    drawn, panels = new_figure(
        max(5.5, sum(widths)), len(maps) * height, len(maps), len(widths), width_ratios=widths
    )
    for (adapter, cells), axes in zip(maps.items(), panels, strict=True):
        spans = _coordinates(rows[adapter])
        alike = [row for own in rows.values() if _coordinates(own) == spans for row in own]
        finite = [row.value for row in alike if math.isfinite(row.value)]
        _draw_cells(axes[0], cells, (min([0.0, *finite]), max([0.0, *finite]) or 1.0))
        axes[0].set_title(_title(rows[adapter], len(maps) > 1))
        if over_time:
            _draw_lines(axes[1], report, adapter)
    drawn.suptitle(f"MIUB: {report.estimator} estimator, noise tau = {report.noise:g}", fontsize=10)
    return drawn


@dataclass(frozen=True)
class HeatMap:
    """Labels, and the mean of the layers in each cell, in nats; nan where there is none."""

    blocks: list[str]
    kinds: list[str]
    cells: list[list[float]]


def heat_map(rows: Sequence[LayerRow], where: dict[str, Place]) -> HeatMap:
    """Return blocks against kinds; where no layer is in a block, layers by name in one column.

    Layers that are in no block, where others are, share the last row.
    """
    if all(where[row.layer].index is None for row in rows):
        return HeatMap([row.layer for row in rows], [""], [[row.value] for row in rows])
    stacks = list(dict.fromkeys(where[row.layer].stack for row in rows))
    blocks = sorted(
        {(place.stack, place.index) for place in (where[row.layer] for row in rows)},
        key=lambda block: (block[1] is None, stacks.index(block[0]), block[1] or 0),
    )
    names = _told_apart([stack for stack, index in blocks if index is not None])
    kinds = list(dict.fromkeys(row.kind for row in rows))
    found: dict[tuple[str, int | None, str], list[float]] = {}
    for row in rows:
        place = where[row.layer]
        found.setdefault((place.stack, place.index, row.kind), []).append(row.value)
    return HeatMap(
        [
            "other" if index is None else f"{names[stack]} {index}".strip()
            for stack, index in blocks
        ],
        kinds,
        [[_mean(found.get((*block, kind), [])) for kind in kinds] for block in blocks],
    )


def _told_apart(stacks: Sequence[str]) -> dict[str, str]:
    """Return names without the components that all have in front or at the end."""
    names = {stack: stack.split(".") for stack in stacks}
    for end in (0, -1):
        while all(names.values()) and len({parts[end] for parts in names.values()}) == 1:
            for parts in names.values():
                del parts[end]
    return {stack: ".".join(parts) for stack, parts in names.items()}


def _coordinates(rows: Sequence[LayerRow]) -> str:
    found = [row.coordinates for row in rows]
    least, most = min(found), max(found)
    return f"{least} coordinates" if least == most else f"{least} to {most} coordinates"


def _title(rows: Sequence[LayerRow], several: bool) -> str:
    steps = max(row.steps for row in rows)
    when = f"mean over {steps} steps" if steps > 1 else f"step {max(row.step for row in rows)}"
    adapter = f"adapter {rows[0].adapter}, " if several else ""
    folded = ", base with folded increments" if any(row.rebased for row in rows) else ""
    return f"{adapter}{when}, {_coordinates(rows)}{folded}"


def _draw_cells(axes: Axes, cells: HeatMap, limits: tuple[float, float]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps[SCALE].with_extremes(bad=_UNMEASURED)
    image = axes.imshow(
        cells.cells, cmap=colours, aspect="auto", vmin=limits[0], vmax=limits[1], origin="upper"
    )
    axes.grid(visible=False)
    axes.set_xticks(range(len(cells.kinds)), cells.kinds, rotation=40)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")
    if all(label.isdecimal() for label in cells.blocks) and len(cells.blocks) > 16:
        axes.yaxis.set_major_locator(MaxNLocator(16, integer=True, steps=[1, 2, 4, 5, 10]))
        axes.yaxis.set_major_formatter(
            lambda i, _: cells.blocks[int(i)] if 0 <= i < len(cells.blocks) else ""
        )
    else:
        axes.set_yticks(range(len(cells.blocks)), cells.blocks)
    if cells.blocks[0].isdecimal():
        axes.set_ylabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.set_label("MIUB (nats)")
    bar.outline.set_visible(False)
    if len(cells.blocks) * len(cells.kinds) <= _CELLS_WITH_NUMBERS:
        _write_numbers(axes, cells, limits)


def _write_numbers(axes: Axes, cells: HeatMap, limits: tuple[float, float]) -> None:
    middle = (limits[0] + limits[1]) / 2
    decimals = 1 if limits[1] >= 10 else 2
    for i, line in enumerate(cells.cells):
        for j, value in enumerate(line):
            if math.isnan(value):
                continue
            # Dark on the light end of the scale, light on the dark one.
            colour = "black" if value > middle else "white"
            axes.text(
                j, i, f"{value:.{decimals}f}", color=colour, ha="center", va="center", fontsize=8
            )


def _draw_lines(axes: Axes, report: LayerRows, adapter: str) -> None:
    """Draw a thin line per layer, a thick one for the mean of each kind."""
    by_kind: dict[str, list[list[LayerRow]]] = {}
    for rows in report.history.values():
        if rows[0].adapter == adapter:
            alike = [row for row in rows if row.coordinates == rows[-1].coordinates]
            by_kind.setdefault(rows[0].kind, []).append(alike)
    for k, (kind, layers) in enumerate(by_kind.items()):
        colour, line = SERIES[k % len(SERIES)], ("-", "--", ":")[k // len(SERIES) % 3]
        if len(layers) > 1:
            for rows in layers:
                points = [row.step for row in rows], [row.value for row in rows]
                axes.plot(*points, color=colour, linewidth=0.6, alpha=0.4)
        at_step: dict[int, list[float]] = {}
        for rows in layers:
            for row in rows:
                at_step.setdefault(row.step, []).append(row.value)
        steps = sorted(at_step)
        means = [_mean(at_step[step]) for step in steps]
        axes.plot(steps, means, line, color=colour, linewidth=2.2, label=kind, zorder=3)
    axes.set_xlabel("step")
    axes.set_ylabel("MIUB (nats)")
    axes.set_title("layers (thin) and the mean of each kind (thick)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + len(by_kind) // 25)


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else math.nan
