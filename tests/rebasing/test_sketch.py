"""Sketches of the change: what reports and logs say of rank and size."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import training
from torch import Tensor, nn

import scalora
from scalora.rebasing.sketch import SKETCH_SIZE, FrozenSketches, SketchedChange

INPUTS = models.vectors(6, 12)


def make(accumulator: str, base: Callable[[], nn.Module] = models.Perceptron, **config: Any) -> Any:
    torch.manual_seed(0)
    model = models.with_lora(base(), **{"target_modules": ["first", "second"], **config})
    options = {"rule": "auto", "interval": 2, "accumulator": accumulator}
    return model, training.optimizer_of(model, lr=3e-2, **options)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def pretrained(model: Any) -> dict[str, Tensor]:
    found = model.get_base_model().state_dict()
    return {name.replace(".base_layer", ""): value.clone() for name, value in found.items()}


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize(
    "base, target, inputs",
    [
        (models.Perceptron, ["first", "second"], INPUTS),
        (models.Embedder, ["tokens", "head"], models.token_ids(4, 5)),
        (
            lambda: models.Convolutions(nn.Conv2d(3, 4, 3)),
            ["convolution", "head"],
            models.vectors(2, 3, 6, 6),
        ),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_report_has_the_rank_and_the_norms_of_the_whole_change(
    accumulator: str, base: Callable[[], nn.Module], target: list[str], inputs: Tensor
) -> None:
    model, optimizer = make(accumulator, base, target_modules=target)
    before = pretrained(model)
    models.train(model, optimizer, inputs, 9)
    expected = scalora.effective_rank(model, before)
    changes = scalora.delta_spectrum(model, before)
    report = optimizer.report()
    assert [row.layer for row in report] == target
    for row, pair in zip(report, optimizer.rebased_pairs, strict=True):
        P, Q = pair.P_parameter.detach().flatten(1), pair.Q_parameter.detach().flatten(1)
        adapter = pair.scaling * (P @ Q)
        assert row.effective_rank == pytest.approx(expected[row.layer], rel=2e-3)
        assert row.trainable_norm == pytest.approx(float(adapter.norm()), rel=1e-4)
        assert 0 < row.frozen_norm < float(changes[row.layer].norm())
        assert row.frozen_columns == 4 * pair.rank


@pytest.mark.parametrize("rank, least", [(1, 0.99), (4, 0.95), (16, 0.9), (64, 0.6)])
def test_rank_of_a_wide_layer_is_a_lower_bound_that_is_close_where_it_is_small(
    rank: int, least: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (300, 500))
    sketch = FrozenSketches({})._sketch(P, Q.mT)
    assert sketch.shape == (SKETCH_SIZE, SKETCH_SIZE)
    found = SketchedChange(sketch, torch.zeros_like(sketch)).effective_rank
    assert least * rank <= found <= rank + 1e-3
    assert float(sketch.norm()) == pytest.approx(rank**0.5, rel=0.2)


def test_layer_that_did_not_change_has_rank_zero_and_no_ratio() -> None:
    _, optimizer = make("dense")
    assert {row.effective_rank for row in optimizer.report()} == {0.0}
    assert optimizer.progress() == {"rebased": 0, "rank": 0.0}


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
def test_resumed_run_reports_what_was_frozen_before(accumulator: str, tmp_path: Any) -> None:
    model, optimizer = make(accumulator)
    models.train(model, optimizer, INPUTS, 5)
    model.save_pretrained(tmp_path)
    scalora.save_training_state(optimizer, tmp_path)
    resumed, other = make(accumulator)
    resumed.load_state_dict(model.state_dict())
    other.inner.load_state_dict(copy.deepcopy(optimizer.inner.state_dict()))
    scalora.load_training_state(other, tmp_path)
    optimizer.zero_grad()  # as they are after resuming, for the age
    assert other.report().rows == optimizer.report().rows
    for pair in ((model, optimizer), (resumed, other)):
        models.train(*pair, INPUTS, 4)
    assert other.report().rows == optimizer.report().rows
    assert other.progress() == optimizer.progress()


def test_state_that_does_not_say_what_was_frozen_gives_no_rank_in_place_of_a_wrong_one() -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 5)
    state = optimizer.state_dict()
    del state["scalora"]["frozen"]
    optimizer.load_state_dict(state)
    models.train(model, optimizer, INPUTS, 4)
    assert optimizer.progress().keys() == {"rebased", "step_factor"}
    for row in optimizer.report():
        assert row.effective_rank != row.effective_rank
        assert row.frozen_columns != row.frozen_columns
    assert "rank so far" in str(optimizer.report())
    assert optimizer.rebasing_state()["frozen"] is None


def test_columns_are_counted_on_where_there_are_no_sketches() -> None:
    """As in the state of a sharded model."""
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 5)
    state = optimizer.state_dict()
    state["scalora"]["frozen"]["sketches"] = {}
    optimizer.load_state_dict(state)
    models.train(model, optimizer, INPUTS, 3)
    pairs = optimizer.rebased_pairs
    assert [row.frozen_columns for row in optimizer.report()] == [4 * pair.rank for pair in pairs]
    assert optimizer.progress().keys() == {"rebased", "step_factor"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_and_reports_do_not_depend_on_the_default_dtype(
    dtype: torch.dtype, default_dtype: Callable[[torch.dtype], None]
) -> None:
    found = []
    for changed in (False, True):
        model, optimizer = make("dense")
        if changed:
            default_dtype(dtype)
        models.train(model, optimizer, INPUTS, 5)
        found.append(optimizer.progress())
    assert found[0] == found[1]


def test_steps_do_not_depend_on_the_default_device() -> None:
    model, optimizer = make("dense")
    torch.set_default_device("meta")
    try:
        models.train(model, optimizer, INPUTS, 3, lambda model, x: model(x).square().mean())
    finally:
        torch.set_default_device(None)
    assert optimizer.progress()["rank"] > 0


def test_report_of_an_adapter_that_is_not_stepped_any_more_has_no_age() -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 3)
    optimizer.param_groups[0]["params"] = []
    assert all(row.age != row.age for row in optimizer.report())


def test_age_is_the_number_of_steps_that_a_column_is_made_of() -> None:
    """With SGD on a gradient that stays, after t steps: t."""
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first"])
    inner = torch.optim.SGD(models.trainable(model), lr=0.1)
    optimizer = scalora.ScaLoRA(inner, model, interval=100, calibration=0)
    for steps in range(1, 4):
        for p in models.trainable(model):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.report()["first"].age == pytest.approx(steps)


def test_table_shows_carries_only_where_there_are_some() -> None:
    for accumulator, shown in (("dense", False), ("carry", True)):
        model, optimizer = make(accumulator)
        models.train(model, optimizer, INPUTS, 3)
        table = str(optimizer.report())
        assert "Re-based once, next in 1 step" in table
        assert ("energy cut" in table) is shown


def test_report_is_drawn_as_the_numbers_of_its_rows(tmp_path: Path) -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 5)
    report = optimizer.report()
    ranks, sizes = report.plot(tmp_path / "report.svg").axes
    assert (tmp_path / "report.svg").stat().st_size > 1000
    found = [line.get_xdata().tolist() for line in ranks.lines]
    assert found == [[row.rank for row in report], [row.effective_rank for row in report]]
    widths = [[bar.get_width() for bar in bars] for bars in sizes.containers]
    assert widths == [
        [row.trainable_norm for row in report],
        [row.frozen_norm for row in report],
    ]
    with pytest.raises(ValueError, match="names no format"):
        report.plot(tmp_path / "report")


def test_table_says_that_the_rank_is_a_lower_bound() -> None:
    _, optimizer = make("dense")
    caption = " ".join(str(optimizer.report()).split())
    assert "a lower bound, from sketches of 64 x 64" in caption


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copy_of_a_run_reports_as_the_run(clone: Callable[[Any], Any]) -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 5)
    other, copied = clone((model, optimizer))
    models.train(model, optimizer, INPUTS, 6)
    models.train(other, copied, INPUTS, 6)
    for row, found in zip(optimizer.report(), copied.report(), strict=True):
        assert found.frozen_norm == pytest.approx(row.frozen_norm, rel=1e-5)
        assert found.effective_rank == pytest.approx(row.effective_rank, rel=1e-3)


def test_pickle_grows_with_the_number_of_layers_and_not_with_its_square() -> None:
    def size(layers: int) -> int:
        names = [str(i) for i in range(layers)]
        base = nn.Sequential(*(nn.Linear(80, 80) for _ in names))
        model = models.with_lora(base, target_modules=names)
        optimizer = training.optimizer_of(model, interval=1)
        models.train(model, optimizer, torch.randn(4, 80), 2)
        return len(pickle.dumps((model, optimizer)))

    four, eight, sixteen = map(size, (4, 8, 16))
    assert sixteen - eight < 2.1 * (eight - four)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_layer_that_is_not_finite_is_reported_and_has_no_rank(broken: float) -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 3)
    with torch.no_grad():
        optimizer.rebased_pairs[0].P_parameter[0, 0] = broken
    first, second = optimizer.report()
    assert math.isnan(first.effective_rank) and second.effective_rank > 0
    optimizer.report().plot()
    assert optimizer.progress().keys() == {"rebased", "step_factor"}


def test_table_shows_a_name_in_brackets_as_it_is() -> None:
    layers = nn.ModuleDict({"[red]a b": nn.Linear(12, 8)})
    model = models.with_lora(nn.Sequential(layers), target_modules=["0.[red]a b"])
    optimizer = training.optimizer_of(model)
    assert "0.[red]a b" in str(optimizer.report())


@pytest.mark.filterwarnings("ignore:ScaLoRA has folded", "ignore:Adapter default was active")
def test_layer_whose_adapter_was_deleted_is_left_out() -> None:
    model, optimizer = make("dense")
    models.train(model, optimizer, INPUTS, 3)
    first = optimizer.rebased_pairs[0]
    first.module.delete_adapter("default")
    assert [row.layer for row in optimizer.report()] == ["second"]
    assert optimizer.progress()["rank"] == optimizer.report()["second"].effective_rank
    model.delete_adapter("default")
    assert not list(optimizer.report()) and "Re-based once" in str(optimizer.report())
