"""What is in a report's pictures and its page; not how they look."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from scalora.ablation.job import Job
from scalora.ablation.methods import RECIPES, SUITES, label_of, method_of
from scalora.ablation.plan import TaskPlan
from scalora.ablation.record import Record
from scalora.ablation.report.page import as_page
from scalora.ablation.report.pictures.curves import learning_curves
from scalora.ablation.report.pictures.learning_rates import learning_rates
from scalora.ablation.report.pictures.looks import Look, looks_of
from scalora.ablation.report.pictures.spectra import spectra
from scalora.ablation.report.pictures.trade_offs import (
    cost_of,
    learning_and_forgetting,
    score_against_parameters,
    score_against_state,
)
from scalora.ablation.report.results import MethodResult, results_of
from scalora.plotting.figures import LORA, MUTED, SCALORA

LOSSES = {"lora:r=1": 1.8, "lora": 1.6, "lora:ranks=4": 1.4, "scalora": 1.5, "full": 1.2}
PARAMETERS = {"lora:r=1": 100, "lora": 200, "lora:ranks=4": 800, "scalora": 200, "full": 5000}


def plan_of(*methods: str) -> TaskPlan:
    return TaskPlan(
        task="tiny",
        name="tiny",
        options=(),
        source_code="",
        metric="loss",
        lower_is_better=True,
        methods=tuple(method_of(method).name for method in methods),
        rates=tuple(method_of(method).rate for method in methods),
        learning_rates=(1e-3, 1e-2, 1e-1),
        seeds=(0, 1),
        search_seeds=(0,),
        steps=100,
        rank=2,
        device="cpu",
    )


def records_of(
    plan: TaskPlan, change: Callable[[Record], Record] = lambda r: r
) -> dict[Job, Record]:
    """Two seeds at the middle rate, one at the others, whose losses are higher."""
    found = {}
    for job in plan.search() + [plan.job(method, 1e-2, 1) for method in plan.methods]:
        middle = plan.job(job.method, 1e-2, job.seed) == job
        loss = LOSSES[job.method] + 0.01 * job.seed + (0 if middle else 0.05)
        found[job] = change(
            Record(
                job,
                "ok",
                curve=[(0, 3.0), (50, loss + 0.1), (100, loss)],
                validation={"loss": loss},
                test={"loss": loss},
                source_before=1.0,
                source_after=3.0 - loss,
                spectrum=[1.0, 0.5, 0.1, 1e-6][: 2 if job.method == "lora" else 4],
                trainable_parameters=PARAMETERS[job.method],
                state_bytes=16 * PARAMETERS[job.method],
            )
        )
    return found


def results(plan: TaskPlan) -> list[MethodResult]:
    return results_of(plan, records_of(plan))


def legend_of(figure: Figure | None) -> list[str]:
    assert figure is not None
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_labels_are_names_of_the_field() -> None:
    assert label_of("lora", 4) == "LoRA, r = 4"
    assert label_of("lora:ranks=2", 4) == label_of("lora:r=8", 4) == "LoRA, r = 8"
    assert label_of("full", 4) == "full fine-tuning"
    first, *options = label_of("scalora:rule=exact:interval=10", 4).splitlines()
    assert first == "ScaLoRA, r = 4"
    assert {option.strip() for option in options} == {"rule = exact", "interval = 10"}
    assert label_of("scalora:gone=1", 4) == "scalora:gone=1"
    assert all(label_of(name, 4).startswith(kind.title) for name, kind in RECIPES.items())


@pytest.mark.parametrize("suite", SUITES)
def test_no_two_methods_of_a_suite_look_alike(suite: str) -> None:
    plan = plan_of(*SUITES[suite])
    looks = looks_of(plan, results_of(plan, {}))
    assert len({look.label for look in looks.values()}) == len(plan.methods)
    seen = {(look.color, look.line, look.marker) for look in looks.values()}
    assert len(seen) == len(plan.methods)


def test_a_method_has_one_colour_whatever_it_is_compared_with() -> None:
    few, many = plan_of("scalora", "lora"), plan_of("dora", "lora", "full", "scalora", "hira")

    def colours(plan: TaskPlan) -> dict[str, Look]:
        return looks_of(plan, results_of(plan, {}))

    assert colours(few)["scalora"].color == colours(many)["scalora"].color == SCALORA
    assert colours(few)["lora"].color == colours(many)["lora"].color == LORA


def test_learning_curves_have_a_panel_of_differences_from_lora() -> None:
    plan = plan_of("lora", "scalora")
    figure = learning_curves(plan, results(plan))
    assert legend_of(figure) == ["LoRA, r = 2", "ScaLoRA, r = 2"]
    curves, differences = figure.axes  # type: ignore[union-attr]
    assert curves.get_ylim()[1] < 3.0  # no room for the loss before training
    ours = next(line for line in differences.lines if same_color(line.get_color(), SCALORA))
    assert list(ours.get_ydata()) == pytest.approx([-0.1, -0.1])


def test_learning_curves_of_orders_of_magnitude_are_logarithmic() -> None:
    plan = plan_of("lora", "scalora")
    low = {"lora": 1.0, "scalora": 1e-3}
    far_apart = records_of(
        plan,
        lambda record: dataclasses.replace(
            record, curve=[(step, low[record.job.method]) for step, _ in record.curve]
        ),
    )
    figure = learning_curves(plan, results_of(plan, far_apart))
    assert figure is not None and [axes.get_yscale() for axes in figure.axes] == ["log"]


def test_learning_rates_that_are_far_off_or_diverged_are_marked_above_the_axes() -> None:
    plan = plan_of("lora", "scalora")

    def far(record: Record) -> Record:
        job = record.job
        if job.method == "lora" and job.learning_rate == 1e-1:
            return Record(job, "diverged", diverged_at=5, curve=[(0, 3.0)])
        if job.method == "scalora" and job.learning_rate == 1e-3:
            return Record(job, "ok", validation={"loss": 1234.5}, test={"loss": 1.0})
        return record

    figure = learning_rates(plan, results_of(plan, records_of(plan, far)))
    assert figure is not None
    (axes,) = figure.axes
    assert 1.6 < axes.get_ylim()[1] <= 3.0
    above = [line for line in axes.lines if list(line.get_ydata()) == [1.0]]
    marks = {line.get_marker(): line.get_xdata()[0] for line in above}
    assert marks == {"x": 1e-1, "^": 1e-3}
    assert [text.get_text() for text in axes.texts] == ["1,234"]
    assert "above the axis" in axes.get_xlabel() and "diverged" in axes.get_xlabel()


def test_lora_is_a_curve_by_rank_and_the_others_are_points() -> None:
    plan = plan_of(*("lora:ranks=4", "scalora", "lora", "full", "lora:r=1"))
    for draw in (score_against_parameters, score_against_state, learning_and_forgetting):
        figure = draw(plan, results(plan))
        names = legend_of(figure)
        assert names == ["LoRA, by rank", "ScaLoRA, r = 2", "full fine-tuning"]
        (axes,) = figure.axes  # type: ignore[union-attr]
        (curve,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
        scores = curve.get_xdata() if draw is learning_and_forgetting else curve.get_ydata()
        assert list(scores) == pytest.approx([1.805, 1.605, 1.405])
        ranks = [text.get_text() for text in axes.texts if text.get_text().startswith("r = ")]
        assert ranks == ["r = 8", "r = 2", "r = 1"]


def test_picture_of_what_it_buys_tells_loras_cost_of_the_same_score() -> None:
    plan = plan_of("lora", "lora:ranks=4", "scalora")
    figure = score_against_parameters(plan, results(plan))
    assert figure is not None
    # Half-way from 1.6 to 1.4, so half-way from 200 to 800 on a logarithmic axis: 400.
    assert "LoRA: × 2.0" in [text.get_text() for text in figure.axes[0].texts]


def test_cost_is_interpolated_along_the_curve_alone() -> None:
    curve = [(100.0, 4.0), (400.0, 2.0), (1600.0, 1.0)]
    assert cost_of(curve, 3.0) == pytest.approx(200.0)
    assert cost_of(curve, 1.0) == pytest.approx(1600.0)
    assert cost_of(curve, 0.5) is None and cost_of(curve, 5.0) is None
    assert cost_of(curve[:1], 4.0) is None


def test_training_state_is_drawn_only_if_every_method_has_it() -> None:
    plan = plan_of("lora", "lora:ranks=4", "scalora")

    def older(record: Record) -> Record:
        if record.job.method != "scalora":
            return record
        return Record(record.job, "ok", test=record.test, validation=record.validation)

    assert score_against_state(plan, results_of(plan, records_of(plan, older))) is None


def test_pictures_without_anything_to_show_are_not_drawn() -> None:
    plan = plan_of("lora", "scalora")
    nothing = results_of(plan, {})
    draws = (learning_curves, learning_rates, spectra, learning_and_forgetting)
    assert all(draw(plan, nothing) is None for draw in draws)
    assert score_against_parameters(plan, results(plan)) is None  # both train as many


def test_spectra_have_a_panel_per_method_and_nothing_in_front_of_it() -> None:
    plan = plan_of("lora", "scalora", "full")
    figure = spectra(plan, results(plan))
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 3
    for axes, values in zip(panels, ([1.0, 0.5], [1.0, 0.5, 0.1], [1.0, 0.5, 0.1]), strict=True):
        front = max(axes.lines, key=lambda line: line.get_zorder())
        assert list(front.get_ydata()) == values  # what rounding leaves is not drawn
        assert not same_color(front.get_color(), MUTED)
        assert sum(same_color(line.get_color(), MUTED) for line in axes.lines) == 3


PICTURE = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def test_page_is_one_file_with_its_pictures_inside(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "one.svg").write_bytes(PICTURE)
    for name in ("one", "two"):
        (tmp_path / "tiny" / f"{name}.png").write_bytes(b"\x89PNG")
    table = "| a | b |\n| - | -: |\n| x | 1 |"
    text = f"# A & B\n\n{table}\n\n![One](tiny/one.png)\n\n![Two](tiny/two.png)\n"
    page = as_page(text, tmp_path)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources == [  # the vector picture where there is one
        f"data:image/svg+xml;base64,{base64.b64encode(PICTURE).decode()}",
        f"data:image/png;base64,{base64.b64encode(b'%cPNG' % 0x89).decode()}",
    ]
    assert "http" not in page and "<link" not in page and "<script" not in page
    assert "<title>A &amp; B</title>" in page and '<td style="text-align:right">1</td>' in page


def test_page_shows_html_of_an_error_as_text(tmp_path: Path) -> None:
    page = as_page("# Failed\n\n* failed: <script>alert(1)</script>\n", tmp_path)
    assert "<script" not in page and "&lt;script&gt;" in page
