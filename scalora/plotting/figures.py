"""Figures in one style, the same bytes for the same numbers."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalora.files import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

LORA = "#0077bb"
SCALORA = "#cc3311"
"""Paul Tol's vibrant blue and red, which the colour-blind can tell apart."""
FULL = "#222222"
FROZEN = "#9aa2ab"
"""Colour of what is no longer trained."""
MUTED = "#c9c9c9"
"""Colour of what stands behind, to compare with."""
TEXT = "#444444"
SERIES = (
    *("#332288", "#ee7733", "#009988", "#ee3377", "#33bbee", "#999933"),
    *("#882255", "#ddaa33", "#117733", "#aa4499", "#888888", "#661100"),
)
"""Colours of what is no method, in turn: Paul Tol's vibrant and muted ones without those above."""
SCALE = "viridis"
"""Name of the colours of a heat map, dark for little."""

_DOTS_PER_INCH = 200
_STYLE: Any = {  # typed by matplotlib with a literal of every key
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    # Element ids in SVG are hashes; without a salt of its own each file would be another.
    "svg.hashsalt": "scalora",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and write in the package's style; a script's own settings are as before afterwards.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed: pip install "scalora[plot]"'
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Return a figure and its axes, (rows, columns); to be called within `style`.

    Not pyplot's: no window opens, and a script's backend and figures stay as they are.

    Args:
        width, height: inches.
        rows, columns: number of panels.
        options: `matplotlib.figure.Figure.subplots`' own.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def encoded(figure: Figure, kind: str) -> bytes:
    """Return the figure as a file's content; the same figure gives the same bytes.

    Args:
        figure: a figure of matplotlib's.
        kind: "png", "svg" or "pdf".

    Raises:
        ValueError: matplotlib does not know the kind.
    """
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    image = io.BytesIO()
    with style():
        figure.savefig(image, format=kind, dpi=_DOTS_PER_INCH, metadata=dates.get(kind))
    return image.getvalue()


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, whole or not at all, in the format that the path's suffix names.

    Raises:
        ValueError: the path has no suffix, or one that matplotlib does not know.
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path} names no format: end it with .png, .svg or .pdf.")
    content = encoded(figure, path.suffix[1:].lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)
