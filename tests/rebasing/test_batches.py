"""Which layers are stacked: remembered from step to step, and anew where something changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import internals
import models
import pytest
import torch
import training
from torch import nn

from scalora.peft_layers import LayerLookup, LoRAPair, lora_pairs
from scalora.rebasing import batches as module
from scalora.rebasing.batches import Batching, LayerBatch, at_once, places


class Equal(nn.Module):
    """Three layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def make() -> tuple[Any, torch.optim.Optimizer, Batching]:
    """A model after a step, with gradients."""
    torch.manual_seed(0)
    model = models.with_lora(Equal(), target_modules=["a", "b", "c"])
    inner = torch.optim.AdamW(models.trainable(model), lr=1e-3)
    for _ in range(2):
        inner.step()
        for p in models.trainable(model):
            p.grad = torch.ones_like(p)
    inner.step()
    return model, inner, Batching(LayerLookup(lora_pairs(model, "default")), lambda pair: None)


def names(batches: list[LayerBatch]) -> list[list[str]]:
    return [[pair.name for pair in batch.pairs] for batch in batches]


def pair_of(model: Any, name: str) -> LoRAPair:
    return next(pair for pair in lora_pairs(model, "default") if pair.name == name)


def test_layers_that_are_alike_are_one_batch_in_every_step() -> None:
    _, inner, batching = make()
    for _ in range(2):
        [batch] = batching.of_step(inner)
        assert [pair.name for pair in batch.pairs] == ["a", "b", "c"]
        assert [pair.P_parameter for pair in batch.pairs] == batch.P
        assert [pair.Q_parameter for pair in batch.pairs] == batch.Q


def _no_gradient(model: Any, inner: torch.optim.Optimizer) -> None:
    pair_of(model, "b").Q_parameter.grad = None


def _merged(model: Any, inner: torch.optim.Optimizer) -> None:
    models.layer(model, "b").merge()


def _out_of_the_optimizer(model: Any, inner: torch.optim.Optimizer) -> None:
    P = pair_of(model, "b").P_parameter
    inner.param_groups[0]["params"] = [p for p in inner.param_groups[0]["params"] if p is not P]


@pytest.mark.parametrize("change", [_no_gradient, _merged, _out_of_the_optimizer])
def test_layer_that_takes_no_part_any_more_is_left_out(change: Callable[..., None]) -> None:
    model, inner, batching = make()
    assert names(batching.of_step(inner)) == [["a", "b", "c"]]
    change(model, inner)
    assert names(batching.of_step(inner)) == [["a", "c"]]


def _without_state(model: Any, inner: torch.optim.Optimizer) -> None:
    inner.state[pair_of(model, "b").P_parameter] = {}


def _other_step(model: Any, inner: torch.optim.Optimizer) -> None:
    inner.state[pair_of(model, "b").P_parameter]["step"] += 1


def _base_in_bfloat16(model: Any, inner: torch.optim.Optimizer) -> None:
    models.layer(model, "b").get_base_layer().bfloat16()


def _factors_in_float64(model: Any, inner: torch.optim.Optimizer) -> None:
    for parameter in (pair_of(model, "b").P_parameter, pair_of(model, "b").Q_parameter):
        parameter.data = parameter.data.double()


def _scaled_otherwise(model: Any, inner: torch.optim.Optimizer) -> None:
    models.layer(model, "b").scaling["default"] = 3.0


def _in_a_group_of_its_own(model: Any, inner: torch.optim.Optimizer) -> None:
    _out_of_the_optimizer(model, inner)
    inner.add_param_group({"params": [pair_of(model, "b").P_parameter]})


CHANGES = [
    *(_without_state, _other_step, _base_in_bfloat16, _factors_in_float64, _scaled_otherwise),
    _in_a_group_of_its_own,
]


@pytest.mark.parametrize("change", CHANGES)
def test_layer_that_is_not_like_the_others_any_more_is_a_batch_of_its_own(
    change: Callable[..., None],
) -> None:
    model, inner, batching = make()
    assert names(batching.of_step(inner)) == [["a", "b", "c"]]
    change(model, inner)
    assert names(batching.of_step(inner)) == [["a", "c"], ["b"]]


def test_counters_need_not_agree_where_no_direction_is_asked_for() -> None:
    model, inner, batching = make()
    _other_step(model, inner)
    assert names(batching.of_step(inner, counters_agree=False)) == [["a", "b", "c"]]


def test_learning_rate_of_zero_takes_no_part() -> None:
    _, inner, batching = make()
    inner.param_groups[0]["lr"] = 0.0
    assert batching.of_step(inner) == []


def test_large_batches_are_moved_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner, batching = make()
    _scaled_otherwise(model, inner)
    batches = batching.of_step(inner)
    assert [names(part) for part in at_once(batches)] == [[["a", "c"], ["b"]]]
    assert places(batches) == [slice(0, 2), slice(2, 3)]
    monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", 1)
    assert [names(part) for part in at_once(batches)] == [[["a", "c"]], [["b"]]]


@pytest.mark.parametrize("forgets", [False, True])
def test_loaded_state_is_looked_at_anew(forgets: bool) -> None:
    """A carry may come back in another dtype, and then is no batch with the others."""
    torch.manual_seed(0)
    model = models.with_lora(Equal(), target_modules=["a", "b", "c"])
    optimizer = training.optimizer_of(model, rule="auto", interval=2, accumulator="carry")
    models.train(model, optimizer, models.vectors(4, 6), 4)
    rebaser = internals.rebaser(optimizer)
    assert names(rebaser._batching.of_step(optimizer.inner)) == [["a", "b", "c"]]
    state = optimizer.rebasing_state()
    carry = state["layers"]["b"]["carry"]
    carry |= {name: carry[name].double() for name in ("up", "down", "cut")}
    if forgets:
        rebaser.forget()
    optimizer.load_rebasing_state(state)
    assert names(rebaser._batching.of_step(optimizer.inner)) == [["a", "c"], ["b"]]
