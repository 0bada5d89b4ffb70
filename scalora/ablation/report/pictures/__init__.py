"""The report's pictures, PNG and SVG; need matplotlib.

Held by tests/ablation/test_ablation_pictures.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.pictures.curves import learning_curves
from scalora.ablation.report.pictures.learning_rates import learning_rates
from scalora.ablation.report.pictures.spectra import spectra
from scalora.ablation.report.pictures.trade_offs import (
    learning_and_forgetting,
    score_against_parameters,
    score_against_state,
)
from scalora.ablation.report.results import MethodResult
from scalora.plotting import write_figure
from scalora.plotting.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[TaskPlan, Sequence[MethodResult]], "Figure | None"]

PICTURES: dict[str, Draw] = {
    "learning-curves": learning_curves,
    "learning-rates": learning_rates,
    "trainable-parameters": score_against_parameters,
    "training-state": score_against_state,
    "learning-and-forgetting": learning_and_forgetting,
    "spectra": spectra,
}
"""Name of a file, without its suffix -> how it is drawn; None: there is nothing to draw."""


def draw_pictures(plan: TaskPlan, results: Sequence[MethodResult], folder: Path) -> list[Path]:
    """Write every picture that has something to show, as PNG and SVG; return the PNGs' paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = []
    for name, draw in PICTURES.items():
        files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        with style():
            figure = draw(plan, results)
        if figure is None:
            for file in files:
                file.unlink(missing_ok=True)  # an earlier report's
            continue
        for file in files:
            write_figure(figure, file)
        drawn.append(files[0])
    return drawn
