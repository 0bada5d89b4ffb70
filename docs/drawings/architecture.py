"""Draw the rooms of both packages on their floors.

    python docs/drawings/architecture.py

Writes architecture-scalora and architecture-miub, .svg and .png, into this folder.  The floors are
those that tests/test_architecture.py holds, so the drawings show what is tested.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from scalora.plotting.figures import TEXT, new_figure, style, write_figure

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tests"))

from test_architecture import FLOORS, MIUB_FLOORS  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floors = tuple[tuple[str, ...], ...]
Parts = list[tuple[str, list[tuple[str, ...]]]]
"""Every part's name and its floors, from above."""

SCALORA_PARTS = {
    "cli": "for a shell",
    "integrations": "for a script",
    "optimizer_hooks": "one step",
    "peft_layers": "layers, choices",
    "carry": "state",
    "fold": "mathematics",
    "sharding": "processes",
    "plotting": "libraries",
    "arguments": "leaves",
}
"""First room of a part, from above -> the part's name."""
MIUB_PARTS = {
    "cli": "for a shell",
    "callback": "for a script",
    "forward_pass": "one pass",
    "bounds": "parts of a\nmeasurement",
    "estimators": "mathematics",
}

GROUND, BOX, INK = "#f6f7f8", "#ffffff", "#1f1f1f"
LINE, GAP, BOX_HEIGHT = 0.42, 0.16, 0.26  # inches of a floor, between two parts, of a room
LETTER, MARGIN = 0.076, 0.3  # inches of a letter, and of what a box has around its name
CAPTION = 1.15  # inches of a part's name


def main() -> None:
    """Write the drawings of both packages beside this file."""
    folder = Path(__file__).parent
    draw("scalora", named_parts(FLOORS, SCALORA_PARTS), folder)
    draw("miub", named_parts(MIUB_FLOORS, MIUB_PARTS), folder)


def draw(package: str, parts: Parts, folder: Path) -> None:
    """Write the drawing of one package, as SVG and PNG."""
    widest = max(width_of(floor) for _, floors in parts for floor in floors)
    width, height = CAPTION + widest + 0.2, sum(LINE * len(floors) + GAP for _, floors in parts)
    with style():
        figure, panels = new_figure(width, height)
    axes = panels[0, 0]
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    draw_parts(axes, width, CAPTION + widest / 2 + 0.1, parts)
    for kind in ("svg", "png"):
        write_figure(figure, folder / f"architecture-{package}.{kind}")


def named_parts(floors: Floors, parts: dict[str, str]) -> Parts:
    """Return every part's name and its floors, from above, without ``__main__`` and the like."""
    shown = [floor for floor in floors if not floor[0].startswith("__")]
    current, names = "", []
    for floor in shown:
        current = next((parts[room] for room in floor if room in parts), current)
        names.append(current)
    pairs = zip(names, shown, strict=True)
    return [(name, [floor for _, floor in own]) for name, own in groupby(pairs, lambda p: p[0])]


def width_of(floor: tuple[str, ...]) -> float:
    """Return inches of a floor's boxes side by side."""
    return sum(LETTER * len(room) + MARGIN for room in floor)


def draw_parts(axes: Axes, width: float, middle: float, parts: Parts) -> None:
    """Draw a package's parts below each other, and an arrow from each to the next."""
    top = 0.0
    for number, (part, floors) in enumerate(parts):
        height = LINE * len(floors)
        shape = FancyBboxPatch(
            (0, top),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=GROUND,
            edgecolor="none",
        )
        axes.add_patch(shape)
        axes.text(0.12, top + height / 2, part, fontsize=8.5, color=TEXT, va="center")
        for place, floor in enumerate(floors):
            draw_floor(axes, middle, top + LINE * (place + 0.5), floor)
            if place:
                edge = top + LINE * place
                draw_arrow(
                    axes, middle, edge + BOX_HEIGHT / 2 - LINE / 2, edge + LINE / 2 - BOX_HEIGHT / 2
                )
        if number:
            draw_arrow(axes, middle, top - GAP, top)
        top += height + GAP


def draw_floor(axes: Axes, middle: float, y: float, floor: tuple[str, ...]) -> None:
    """Draw the rooms of a floor, centred."""
    x = middle - width_of(floor) / 2
    for room in floor:
        width = LETTER * len(room) + MARGIN - 0.1
        shape = FancyBboxPatch(
            (x + 0.05, y - BOX_HEIGHT / 2),
            width,
            BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=BOX,
            edgecolor=TEXT,
            linewidth=0.8,
        )
        axes.add_patch(shape)
        axes.text(
            x + 0.05 + width / 2,
            y,
            room,
            fontsize=8.5,
            family="monospace",
            color=INK,
            ha="center",
            va="center",
        )
        x += LETTER * len(room) + MARGIN


def draw_arrow(axes: Axes, x: float, start: float, end: float) -> None:
    """Draw an arrow down: what lies above imports what lies below."""
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "color": TEXT, "linewidth": 1}
    axes.add_patch(FancyArrowPatch((x, start), (x, end), shrinkA=0, shrinkB=0, **look))


if __name__ == "__main__":
    main()
