"""Figures: one style, the same bytes for the same numbers, and nothing lost where one cannot be."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from scalora.plotting import (
    LayerNumbers,
    encoded,
    layers_figure,
    new_figure,
    spectra_figure,
    write_figure,
)
from scalora.plotting.figures import style
from scalora.plotting.spectra import energy_beyond, mean_of_spectra

SPECTRA = {"first": [4.0, 2.0, 1.0, 0.0], "second": [2.0, 2.0], "unchanged": [0.0, 0.0]}


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_same_numbers_give_the_same_bytes(kind: str) -> None:
    one, other = (encoded(spectra_figure(SPECTRA, {1}), kind) for _ in range(2))
    assert one == other


def test_style_is_left_behind_by_no_figure() -> None:
    before = dict(matplotlib.rcParams)
    encoded(spectra_figure(SPECTRA, {2}), "svg")
    assert dict(matplotlib.rcParams) == before


def test_figures_are_written_in_the_format_of_their_suffix(tmp_path: Path) -> None:
    figure = spectra_figure(SPECTRA, {2})
    beginnings = {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}
    for suffix, beginning in beginnings.items():
        path = tmp_path / "new" / f"spectrum{suffix}"
        write_figure(figure, path)
        assert path.read_bytes().startswith(beginning)


@pytest.mark.parametrize("name", ["spectrum", "spectrum.xyz"])
def test_path_of_no_known_format_is_refused_and_nothing_is_written(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"format|xyz"):
        write_figure(spectra_figure(SPECTRA, {2}), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "scalora\[plot\]"'):
        spectra_figure(SPECTRA, {2})


def test_figure_is_drawn_without_pyplot() -> None:
    with style():
        figure, panels = new_figure(4, 3, rows=2, columns=3)
    assert isinstance(figure, Figure) and panels.shape == (2, 3)
    assert figure.canvas.manager is None


def test_spectra_have_a_line_per_layer_their_mean_and_each_rank() -> None:
    (axes,) = spectra_figure(SPECTRA, {1, 2}).axes
    lines = [list(line.get_ydata()) for line in axes.lines]
    # Relative to the largest; a value of zero and an unchanged layer are no part of a spectrum.
    assert [1.0, 0.5, 0.25] in lines and [1.0, 1.0] in lines
    assert [1.0, 0.75, 0.125] in lines
    assert [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1] == [1, 2]
    assert {text.get_text() for text in axes.texts} == {"r = 1", "r = 2"}


def test_title_has_the_energy_beyond_the_highest_rank() -> None:
    # Of 16 + 4 + 1 beyond 2: 1 / 21; of 4 + 4: none
    assert energy_beyond({"a": [4.0, 2.0, 1.0], "b": [2.0, 2.0]}, 2) == pytest.approx(1 / 42)
    (axes,) = spectra_figure(SPECTRA, {1, 2}).axes
    assert axes.get_title(loc="left") == "2% of the change's energy is beyond rank 2"


def test_mean_spectrum_counts_an_ended_one_as_zero() -> None:
    assert mean_of_spectra([[1.0, 0.5, 0.25], [1.0, 1.0]]) == [1.0, 0.75, 0.125]


def test_spectra_without_any_change_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer has changed"):
        spectra_figure({"first": [0.0, 0.0]}, {1})


def test_layers_have_their_rank_beside_loras_and_two_sizes() -> None:
    layers = [
        LayerNumbers("blocks.0.q", 2, 5.5, 3.0, 1.0),
        LayerNumbers("blocks.0.v", 4, 4.5, 2.0, 0.5),
    ]
    ranks, sizes = layers_figure(layers, "Re-based once").axes
    points = {line.get_label(): line.get_xydata().tolist() for line in ranks.lines}
    assert points == {
        "LoRA's r": [[2, 0], [4, 1]],
        "rank so far, at least": [[5.5, 0], [4.5, 1]],
    }
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in sizes.containers}
    assert widths == {"trainable": [1.0, 0.5], "frozen so far": [3.0, 2.0]}
    assert [label.get_text() for label in ranks.get_yticklabels()] == ["q", "v"]
    low, high = ranks.get_ylim()
    assert low > high  # the first layer is above


def test_many_layers_fit_a_page_and_some_are_named() -> None:
    layers = [LayerNumbers(f"model.layers.{i}.q_proj", 8, 9.0, 1.0, 1.0) for i in range(500)]
    figure = layers_figure(layers, "")
    assert figure.get_figheight() < 13
    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 25 < len(named) < 60 and named[0] == "0.q_proj"


def test_layer_of_which_nothing_is_known_has_a_line_and_no_points(tmp_path: Path) -> None:
    unknown = LayerNumbers("sharded", 2, math.nan, math.nan, math.nan)
    write_figure(
        layers_figure([LayerNumbers("a", 2, 3.0, 1.0, 1.0), unknown], ""), tmp_path / "a.svg"
    )
    with pytest.raises(ValueError, match="sharded model"):
        layers_figure([unknown], "")
