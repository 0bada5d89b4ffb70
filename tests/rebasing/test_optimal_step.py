"""What is matched once is held, and the host learns of it without waiting."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from scalora.rebasing.optimal_step import ArrivingFlag, HeldLipschitz


def batch(*names: str) -> Any:
    return SimpleNamespace(pairs=[SimpleNamespace(name=name) for name in names], P=[torch.ones(1)])


def make(*names: str) -> tuple[HeldLipschitz, list[Any]]:
    return HeldLipschitz({}), [batch(*names[:2]), batch(*names[2:])]


def settled(held: HeldLipschitz, batches: list[Any], values: torch.Tensor) -> None:
    for each, part in zip(batches, values.split([2, 1]), strict=True):
        held.hold(each, part)
    held.settle(batches, values)


def test_nothing_is_known_before_it_is_matched() -> None:
    held, batches = make("a", "b", "c")
    found = held.of(batches)
    assert found.lipschitz_lr.isnan().all() and not found.is_known


def test_layers_that_could_not_be_matched_stay_unknown_until_they_are() -> None:
    held, batches = make("a", "b", "c")
    held.of(batches)
    for values, known in (([1.0, torch.nan, 3.0], False), ([1.0, 2.0, 3.0], True)):
        numbers = torch.tensor(values, dtype=torch.float64)
        settled(held, batches, numbers)
        found = held.of(batches)
        torch.testing.assert_close(found.lipschitz_lr, numbers, equal_nan=True)
        assert found.is_known == known


def test_stack_is_made_once_and_anew_where_another_state_was_loaded() -> None:
    held, batches = make("a", "b", "c")
    held.of(batches)
    settled(held, batches, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert held.of(batches).lipschitz_lr is held.of(batches).lipschitz_lr
    del held.values["b"]
    found = held.of(batches)
    assert not found.is_known and found.lipschitz_lr[1].isnan()
    held.values["b"] = torch.tensor(5.0, dtype=torch.float64)
    assert held.of(batches).is_known
    assert held.of(batches[:1]).lipschitz_lr.tolist() == [1.0, 5.0]


def test_flag_of_a_device_is_false_until_it_has_arrived() -> None:
    assert not ArrivingFlag(torch.ones(2, device="meta"))
    assert ArrivingFlag(torch.ones(2)) and not ArrivingFlag(torch.tensor([1.0, torch.nan]))
