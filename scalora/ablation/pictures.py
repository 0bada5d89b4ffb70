"""The report's pictures; needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from scalora.ablation.plan import TaskPlan
from scalora.ablation.rows import Row
from scalora.ablation.summary import Statistic
from scalora.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's bright scheme, which the colour-blind can tell apart, and black.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#222222")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
_WIDE = 8.0  # a ratio of losses beyond which an axis is logarithmic
_CROSSES = 8  # lines of crosses above a picture


class _Look(NamedTuple):
    color: str
    line: str
    marker: str


def draw_pictures(plan: TaskPlan, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures that there is something to draw in; return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures: dict[str, Callable[[Axes, TaskPlan, Sequence[Row]], bool]] = {
        "learning-curves.png": learning_curves,
        "learning-rates.png": learning_rates,
        "learning-and-forgetting.png": learning_and_forgetting,
        "spectra.png": spectra,
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in pictures.items():
        image = _image(draw, plan, rows)
        if image is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
            continue
        write_bytes(folder / name, image)
        drawn.append(folder / name)
    return drawn


def learning_curves(axes: Axes, plan: TaskPlan, rows: Sequence[Row]) -> bool:
    """Draw validation loss against steps, at each method's best learning rate."""
    for i, row in enumerate(rows):
        if not row.curve:
            continue
        look = _look(i)
        steps, losses, errors = zip(*row.curve, strict=True)
        # A run that diverged at once has one point.
        marker = look.marker if len(steps) == 1 else None
        axes.plot(steps, losses, look.line, color=look.color, marker=marker, label=_label(row))
        low = [loss - (error or 0) for loss, error in zip(losses, errors, strict=True)]
        high = [loss + (error or 0) for loss, error in zip(losses, errors, strict=True)]
        axes.fill_between(steps, low, high, color=look.color, alpha=0.15, linewidth=0)
    if not axes.lines:
        return False
    _loss_scale(axes, [loss for row in rows for _, loss, _ in row.curve])
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_xlim(0, plan.steps)
    axes.set_title(f"{plan.name}: learning curves, each at its best learning rate")
    return True


def learning_rates(axes: Axes, plan: TaskPlan, rows: Sequence[Row]) -> bool:
    """Draw validation loss against learning rate; a cross on top for what diverged."""
    axes.set_xscale("log")
    rates = {rate for row in rows for rate in row.by_rate}
    axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    crossed = 0
    for i, row in enumerate(rows):
        look = _look(i)
        points = {rate: found for rate, found in row.by_rate.items() if found is not None}
        finite = {rate: found for rate, found in points.items() if not found.diverged}
        _points(axes, list(finite), list(finite.values()), look, label=_label(row))
        if row.best in finite:
            best = finite[row.best].mean
            axes.plot(row.best, best, look.marker, color=look.color, markersize=10)
        lost = [rate for rate, found in points.items() if found.diverged]
        if lost:
            axes.plot(
                lost,
                # A line a method above the axes, as they diverge at the same rates.
                [1.02 + 0.03 * (crossed % _CROSSES)] * len(lost),
                "x",
                color=look.color,
                markersize=7,
                markeredgewidth=2,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
            crossed += 1
    known = [found for row in rows for found in row.by_rate.values() if found is not None]
    if not known:
        return False
    _loss_scale(axes, [found.mean for found in known if not found.diverged])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    crosses = "; ×: diverged" if crossed else ""
    title = f"{plan.name}: learning rates (large: chosen{crosses})"
    axes.set_title(title, pad=8 + 8 * min(crossed, _CROSSES))
    return True


def learning_and_forgetting(axes: Axes, plan: TaskPlan, rows: Sequence[Row]) -> bool:
    """Draw what was forgotten against what was learned; False if the task knows no source."""
    drawn = 0
    for i, row in enumerate(rows):
        test = row.test.get(plan.metric)
        if test is None or test.diverged or row.forgetting is None or row.forgetting.diverged:
            continue
        look = _look(i)
        axes.errorbar(
            test.mean,
            row.forgetting.mean,
            xerr=test.stderr,
            yerr=row.forgetting.stderr,
            fmt=look.marker,
            color=look.color,
            markersize=8,
            capsize=3,
            label=_label(row),
        )
        drawn += 1
    better = "lower" if plan.lower_is_better else "higher"
    axes.set_xlabel(f"learning: test {plan.metric} ({better} is better)")
    axes.set_ylabel("forgetting: source loss,\nafter − before (lower is better)")
    axes.set_title(f"{plan.name}: learning against forgetting")
    return drawn > 0


def spectra(axes: Axes, plan: TaskPlan, rows: Sequence[Row]) -> bool:
    """Draw the singular values of the whole change over the largest, mean over the layers."""
    for i, row in enumerate(rows):
        # What rounding leaves of a rank that is not there would be most of the picture.
        values = [value for value in row.spectrum if value > 1e-4]
        if values:
            look = _look(i)
            places = range(1, len(values) + 1)
            axes.plot(places, values, look.line, color=look.color, label=_label(row))
    if not axes.lines:
        return False
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
    axes.axvline(plan.rank, color="#888888", linewidth=0.8, zorder=0)
    axes.annotate(
        f"r = {plan.rank}",
        (plan.rank, 0.02),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        color="#555555",
    )
    axes.set_xlabel("singular value, from the largest")
    axes.set_ylabel("over the largest, mean of the layers")
    axes.set_title(f"{plan.name}: spectrum of the change")
    return True


def _image(
    draw: Callable[[Axes, TaskPlan, Sequence[Row]], bool], plan: TaskPlan, rows: Sequence[Row]
) -> bytes | None:
    # Not pyplot: there is no window to open, and no backend of anybody's to change.
    from matplotlib.figure import Figure

    columns = 1 + (len(rows) - 1) // 16
    figure = Figure(figsize=(7.5 + 1.8 * (columns - 1), 4.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if not draw(axes, plan, rows):
        return None
    axes.title.set(fontsize=11, ha="left", x=0)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        fontsize=9,
        ncols=columns,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _points(
    axes: Axes, x: Sequence[float], found: Sequence[Statistic], look: _Look, label: str
) -> None:
    axes.errorbar(
        x,
        [one.mean for one in found],
        yerr=[one.stderr or 0.0 for one in found],
        fmt=look.line,
        marker=look.marker,
        markersize=5,
        capsize=2,
        color=look.color,
        label=label,
    )


def _loss_scale(axes: Axes, losses: Sequence[float]) -> None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) > _WIDE * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def _look(i: int) -> _Look:
    colours = len(_COLOURS)
    line = _LINES[i // colours % len(_LINES)]
    return _Look(_COLOURS[i % colours], line, _MARKERS[i % len(_MARKERS)])


def _label(row: Row) -> str:
    test = next(iter(row.test.values()), None)
    lost = f"\n({test.diverged} of {test.n} diverged)" if test is not None and test.diverged else ""
    return f"{row.method.replace(':', chr(10) + '  ', 1)}{lost}"
