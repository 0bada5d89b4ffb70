"""A figure of what re-basing did to each layer: its rank so far, trainable beside frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from scalora.plotting.figures import FROZEN, LORA, SCALORA, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE, _LEAST, _MOST = 0.2, 1.0, 11.0
"""Inches of a layer's line, and of the panels' height at least and at most."""
_LETTER = 0.075
"""Inches of a letter of a layer's name."""


class LayerNumbers(NamedTuple):
    """Numbers that are drawn of one layer; NaN where it is not known.

    Attributes:
        name: of the layer.
        rank: the adapter's r.
        effective_rank: of the whole change so far, or a lower bound.
        frozen, trainable: Frobenius norms of the two parts of the change.
    """

    name: str
    rank: int
    effective_rank: float
    frozen: float
    trainable: float


def layers_figure(layers: Sequence[LayerNumbers], title: str) -> Figure:
    """Return a figure with a line per layer, from above to below.

    Left: the rank so far, against the r at which LoRA ends. Right: the sizes of what is trainable
    and of all that was frozen.

    Args:
        layers: in the model's order.
        title: of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing is known of any layer.
    """
    if all(math.isnan(layer.effective_rank + layer.frozen) for layer in layers):
        raise ValueError(
            "neither rank nor size of any layer is known: rule='none', a sharded model, or no "
            "adapter is left. There is nothing to draw."
        )
    names = _shortened([layer.name for layer in layers])
    with style():
        height = min(_MOST, max(_LEAST, _LINE * len(layers)))
        width = 7.0 + _LETTER * max(map(len, names))
        figure, panels = new_figure(width, height + 1.5, columns=2, sharey=True)
        ranks, sizes = panels[0]
        _draw_ranks(ranks, layers)
        _draw_sizes(sizes, layers)
        shown = range(0, len(names), -(-len(names) // round(_MOST / _LINE)))
        ranks.set_yticks(shown, [names[place] for place in shown])
        ranks.set_ylim(len(layers) - 0.4, -0.6)
        for axes in (ranks, sizes):
            axes.set_xlim(left=0)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        figure.suptitle(title, fontsize=10)
        return figure


def _draw_ranks(axes: Axes, layers: Sequence[LayerNumbers]) -> None:
    """Draw a line from each adapter's r to the rank so far."""
    places = range(len(layers))
    found = [layer.effective_rank for layer in layers]
    ranks = [layer.rank for layer in layers]
    axes.hlines(places, ranks, found, color=SCALORA, linewidth=1.2, alpha=0.5)
    axes.plot(ranks, places, "|", color=LORA, markersize=9, markeredgewidth=2, label="LoRA's r")
    axes.plot(found, places, "D", color=SCALORA, markersize=4.5, label="rank so far, at least")
    axes.set_xlabel("effective rank of the whole change")


def _draw_sizes(axes: Axes, layers: Sequence[LayerNumbers]) -> None:
    """Draw two bars per layer."""
    places = range(len(layers))
    bars = (
        (-0.19, "trainable", SCALORA, [layer.trainable for layer in layers]),
        (0.19, "frozen so far", FROZEN, [layer.frozen for layer in layers]),
    )
    for shift, label, color, values in bars:
        axes.barh([place + shift for place in places], values, 0.36, color=color, label=label)
    axes.set_xlabel("size of the change (Frobenius norm)")


def _shortened(names: Sequence[str]) -> list[str]:
    """Return names without the components that all have in front."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(own) > 1 for own in parts) and len({p[0] for p in parts}) == 1:
        parts = [own[1:] for own in parts]
    return [".".join(own) for own in parts]
