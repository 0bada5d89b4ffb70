"""Which learning rate is looked at: that of the LoRA factors, whatever other groups have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn

import scalora
from scalora.step_length.rates import highest_rate

WINDOW = 6
INPUTS = models.vectors(16, 12)


def with_another_group(rate: float, **options: Any) -> tuple[Any, scalora.ScaLoRA]:
    """A model, and an optimizer whose second group is a parameter that takes no part in it."""
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    other = nn.Parameter(torch.ones(3))
    groups = [{"params": [other], "lr": rate}, {"params": models.trainable(model), "lr": 1e-3}]
    inner = torch.optim.AdamW(groups, weight_decay=0.1)
    return model, scalora.ScaLoRA(inner, model, rule="exact", **options)


@pytest.mark.parametrize(
    "other",
    [lambda step: 1.0, lambda step: 0.1**step, lambda step: 1e-4 * step],
    ids=["constant", "falling", "rising"],
)
def test_length_of_the_step_is_calibrated_whatever_rate_another_group_has(
    other: Callable[[int], float],
) -> None:
    def factors(rate: Callable[[int], float]) -> list[float]:
        model, optimizer = with_another_group(rate(0), calibration=WINDOW)
        found = []
        for step in range(3 * WINDOW):
            optimizer.param_groups[0]["lr"] = rate(step)
            # A warm-up: the window begins at its end.
            optimizer.param_groups[1]["lr"] = 1e-3 * min(1.0, (step + 1) / WINDOW)
            models.train(model, optimizer, INPUTS, 1)
            assert optimizer.step_factor is not None
            found.append(optimizer.step_factor.item())
        return found

    expected = factors(lambda step: 0.0)
    assert expected[-1] != expected[WINDOW - 1]
    assert factors(other) == expected


def test_first_step_that_trains_a_head_alone_is_a_step() -> None:
    """The adapter's warm-up begins at 0, and no gradient has come yet."""
    model, optimizer = with_another_group(1e-2)
    [other] = optimizer.param_groups[0]["params"]
    optimizer.param_groups[1]["lr"] = 0.0
    for parameter in (other, *models.trainable(model)):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert (other < 1).all()  # by decay
    optimizer.step()
    assert optimizer.state[other]["step"] == 2


def test_highest_rate_is_that_of_the_groups_that_hold_the_parameters() -> None:
    first, second, other = (nn.Parameter(torch.ones(1)) for _ in range(3))
    on_a_device = torch.tensor(7.0, device="meta")
    groups: list[dict[str, Any]] = [
        {"params": [other], "lr": on_a_device},
        {"params": [first], "lr": torch.tensor(2.0)},
        {"params": [second], "lr": 3.0},
    ]
    assert highest_rate(groups, [first]) == 2
    assert highest_rate(groups, [first, second]) == 3
    assert highest_rate(groups, [first, other]) is None
    assert highest_rate(groups, []) is None
