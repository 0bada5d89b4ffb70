"""The spectrum of a change of weights, against the rank that LoRA would stop at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from scalora.plotting.figures import LORA, SCALORA, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROUNDING = 1e-4
"""Singular values below this share of the largest are what rounding leaves; they are not drawn."""

_CUT = (0, (4, 3))  # dashes


def spectra_figure(spectra: Mapping[str, Sequence[float]], ranks: Collection[int]) -> Figure:
    """Return a figure of the singular values of each layer's change, and of their mean.

    Each layer's are over its largest. A dashed line is where an adapter of rank r alone would end:
    what lies to its right is what re-basing has added.

    Args:
        spectra: layer name -> singular values, descending.
        ranks: the adapters' r; several where the layers have several.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no layer has changed.
    """
    relative = {
        layer: [value / values[0] for value in values if value > ROUNDING * values[0]]
        for layer, values in spectra.items()
        if len(values) and values[0] > 0
    }
    if not relative:
        raise ValueError("no layer has changed yet, so there is no spectrum to draw.")
    with style():
        figure, panels = new_figure(6.4, 3.8)
        axes: Axes = panels[0, 0]
        for values in relative.values():
            axes.plot(range(1, len(values) + 1), values, color=SCALORA, linewidth=0.7, alpha=0.35)
        mean = mean_of_spectra(list(relative.values()))
        places = range(1, len(mean) + 1)
        axes.plot(
            places, mean, "o-", color=SCALORA, markersize=3, linewidth=2.2, label="mean of layers"
        )
        axes.plot([], [], color=SCALORA, linewidth=0.7, alpha=0.6, label="one layer each")
        axes.plot([], [], color=LORA, linestyle=_CUT, linewidth=1.2, label="where LoRA ends")
        spectrum_axes(axes)
        for rank in sorted(set(ranks)):
            mark_rank(axes, rank)
        axes.set_xlabel("singular value, from the largest")
        axes.set_ylabel("relative to the largest")
        beyond = energy_beyond(relative, max(ranks))
        axes.set_title(f"{beyond:.0%} of the change's energy is beyond rank {max(ranks)}")
        axes.legend(loc="upper right")
        return figure


def energy_beyond(spectra: Mapping[str, Sequence[float]], rank: int) -> float:
    """Return the share of squared singular values after the first ``rank``, mean of the layers."""
    shares = [
        sum(value**2 for value in values[rank:]) / sum(value**2 for value in values)
        for values in spectra.values()
    ]
    return sum(shares) / len(shares)


def mean_of_spectra(spectra: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean at each place; a spectrum that has ended counts as zero there."""
    length = max(len(values) for values in spectra)
    return [
        sum(values[place] for values in spectra if place < len(values)) / len(spectra)
        for place in range(length)
    ]


def mark_rank(axes: Axes, rank: int) -> None:
    """Draw a line at the last singular value that an adapter of this rank has."""
    axes.axvline(rank, color=LORA, linestyle=_CUT, linewidth=1.2, zorder=1)
    axes.annotate(
        f"r = {rank}",
        (rank, 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        color=LORA,
        fontsize=8.5,
    )


def spectrum_axes(axes: Axes) -> None:
    """Make both axes logarithmic, with plain numbers of singular values."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yscale("log")
