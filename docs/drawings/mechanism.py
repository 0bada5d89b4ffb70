"""Draw the mechanism of the default rule: what is trained, what is frozen, and where it goes.

    python docs/drawings/mechanism.py

Writes mechanism.svg and .png and mechanism-dark.svg and .png into this folder, on a transparent
ground: README shows the one that fits the reader's page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from scalora.plotting.figures import new_figure, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANK = 3
LONG, THIN = 1.5, 0.17  # sides of a weight, width of a column
WIDTH, HEIGHT = 15.6, 6.0


@dataclass(frozen=True)
class Palette:
    """Colours of one ground."""

    ink: str
    dim: str
    frozen: str
    trained: str
    leaving: str
    moments: str
    panel: str


LIGHT = Palette("#1f1f1f", "#5c5c5c", "#c4c9cf", "#cc3311", "#f0b3a4", "#0077bb", "#f6f7f8")
DARK = Palette("#eaeaea", "#a8adb3", "#5a6069", "#ff6a4a", "#8a4536", "#4fb3f0", "#1b1f24")


class Drawing:
    """Boxes, arrows and words on one pair of axes, in one palette."""

    def __init__(self, axes: Axes, palette: Palette) -> None:
        self.axes, self.palette = axes, palette

    def text(self, x: float, y: float, words: str, **options: object) -> None:
        """Write words, centred unless told otherwise."""
        defaults = {"ha": "center", "va": "center", "color": self.palette.ink, "fontsize": 11}
        self.axes.text(x, y, words, **{**defaults, **options})

    def panel(self, x: float, width: float, title: str, caption: str) -> None:
        """Draw the ground of one stage, its title above and its caption at the foot."""
        shape = FancyBboxPatch(
            (x, 1.25),
            width,
            4.15,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor=self.palette.panel,
            edgecolor="none",
        )
        self.axes.add_patch(shape)
        self.text(x + 0.2, 5.7, title, ha="left", fontsize=13, fontweight="bold")
        self.text(x + width / 2, 1.68, caption, color=self.palette.dim, fontsize=10.5)

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draw a rectangle by its lower left corner."""
        self.axes.add_patch(
            Rectangle((x, y), width, height, facecolor=color, edgecolor=self.palette.panel, lw=1.2)
        )

    def weight(self, x: float, y: float, label: str) -> None:
        """Draw a dense matrix (m, n) by its centre."""
        self.box(x - LONG / 2, y - LONG / 2, LONG, LONG, self.palette.frozen)
        self.text(x, y, label, fontsize=13)

    def factors(self, x: float, y: float, color: str, names: tuple[str, str]) -> float:
        """Draw P and Q^T by the left end and the centre of P; return the right end of Q^T."""
        for j in range(RANK):
            self.box(x + j * THIN, y - LONG / 2, THIN, LONG, color)
        right = x + RANK * THIN + 0.18
        for j in range(RANK):
            self.box(right, y + LONG / 2 - (j + 1) * THIN, LONG, THIN, color)
        self.text(x + RANK * THIN / 2, y - LONG / 2 - 0.24, names[0])
        self.text(right + LONG / 2, y + LONG / 2 - RANK * THIN - 0.26, names[1])
        return right + LONG

    def column(self, x: float, y: float, size: float = 0.5) -> None:
        """Draw the frozen part of one column, p_j q_j^T, by its left end and its centre."""
        width = 0.22 * size
        self.box(x, y - size / 2, width, size, self.palette.leaving)
        self.box(x + width, y + size / 2 - width, size, width, self.palette.leaving)

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], **options: object
    ) -> None:
        """Draw an arrow."""
        defaults = {"arrowstyle": "-|>", "mutation_scale": 14, "lw": 1.8, "color": self.palette.dim}
        self.axes.add_patch(FancyArrowPatch(start, end, **{**defaults, **options}))


def train(drawing: Drawing, x: float) -> None:
    """Draw the first stage: a frozen weight and an adapter beside it, as in LoRA."""
    palette = drawing.palette
    drawing.panel(
        x, 4.5, "1  Train", "P and Q are trained by the optimizer\nthat you have, as in LoRA"
    )
    drawing.weight(x + 0.98, 3.9, "$W_0$")
    drawing.text(x + 0.98, 2.9, "frozen", color=palette.dim, fontsize=10.5)
    drawing.text(x + 1.9, 3.9, "+", fontsize=16)
    drawing.factors(x + 2.08, 3.9, palette.trained, ("$P$", "$Q^{\\top}$"))
    drawing.text(x + 3.48, 3.45, "r columns", color=palette.trained, fontsize=10.5)


def rebase(drawing: Drawing, x: float) -> None:
    """Draw the second stage: each column is split into what stays and what is frozen."""
    palette = drawing.palette
    drawing.panel(
        x,
        5.2,
        "2  Re-base, every few steps",
        "a part of each column stays, the rest is frozen;\nwhat the model computes does not change",
    )
    top, foot = 4.3, 2.7
    end = drawing.factors(x + 0.75, top, palette.trained, ("$\\alpha P$", "$Q^{\\top}$"))
    drawing.text(end + 0.25, top + 0.2, "$\\alpha\\; p_j q_j^{\\top}$", ha="left")
    drawing.text(end + 0.25, top - 0.2, "stays trainable", ha="left", color=palette.trained)
    drawing.text(x + 0.42, foot, "+", fontsize=16)
    for j in range(RANK):
        drawing.column(x + 0.77 + 0.74 * j, foot)
    drawing.text(end + 0.25, foot + 0.2, "$(1-\\alpha)\\; p_j q_j^{\\top}$", ha="left")
    drawing.text(end + 0.25, foot - 0.2, "is frozen", ha="left", color=palette.dim)


def go_on(drawing: Drawing, x: float) -> None:
    """Draw the third stage: where frozen parts go, and the rank that they add up to."""
    palette = drawing.palette
    drawing.panel(
        x,
        4.8,
        "3  Go on",
        "frozen parts add up to a rank far above r,\nand the adapter has room again",
    )
    center = 3.8
    drawing.weight(x + 1.05, center + 0.1, "$W_0$")
    for j in range(RANK):
        drawing.column(x + 0.46 + 0.43 * j, center - 0.36, size=0.26)
    drawing.text(
        x + 0.3,
        center - 1.1,
        "frozen parts go into the weight, or beside\nit if it is quantized (the carry)",
        ha="left",
        color=palette.dim,
        fontsize=10,
    )
    drawing.text(x + 2.05, center + 0.1, "+", fontsize=16)
    drawing.factors(x + 2.3, center + 0.1, palette.trained, ("", "$Q^{\\top}$"))
    drawing.text(x + 2.98, center - 0.5, "$\\alpha P$")


def moments(drawing: Drawing, x: float, width: float) -> None:
    """Draw the strip at the foot: what becomes of the optimizer's state."""
    palette = drawing.palette
    shape = FancyBboxPatch(
        (x, 0.15),
        width,
        0.8,
        boxstyle="round,pad=0,rounding_size=0.15",
        facecolor="none",
        edgecolor=palette.moments,
        lw=1.4,
    )
    drawing.axes.add_patch(shape)
    drawing.text(
        x + width / 2,
        0.55,
        "The optimizer's moments are converted, exactly: "
        "$m_Q \\to \\alpha\\, m_Q$,  $v_Q \\to \\alpha^2 v_Q$;  "
        "those of $P$ stay.  Nothing restarts.",
        color=palette.moments,
    )


def draw(palette: Palette, path: Path) -> None:
    """Write the drawing in one palette, as SVG and PNG."""
    with style():
        figure, panels = new_figure(WIDTH * 0.72, HEIGHT * 0.72)
    figure.patch.set_alpha(0)
    axes = panels[0, 0]
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.set_aspect("equal")
    drawing = Drawing(axes, palette)
    train(drawing, 0.1)
    rebase(drawing, 4.98)
    go_on(drawing, 10.6)
    drawing.arrow((4.6, 3.9), (4.98, 3.9))
    drawing.arrow((10.2, 3.9), (10.58, 3.9))
    moments(drawing, 0.1, 15.3)
    for kind in ("svg", "png"):
        write_figure(figure, path.with_suffix(f".{kind}"))


def main() -> None:
    """Write both palettes beside this file."""
    folder = Path(__file__).parent
    draw(LIGHT, folder / "mechanism.svg")
    draw(DARK, folder / "mechanism-dark.svg")


if __name__ == "__main__":
    main()
