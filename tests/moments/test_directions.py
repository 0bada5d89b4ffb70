from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from reference import OPTIMIZERS, OptimizerCase
from torch import Tensor, nn

from scalora.moments import directions, moments_of

STEPS = 9  # RAdam rectifies from the sixth
SHAPES = {"matrix": (5, 3), "convolution": (3, 4, 2, 2), "rank one": (4, 1)}


def _options(case: OptimizerCase, **more: Any) -> dict[str, Any]:
    accepted = inspect.signature(case.cls).parameters
    plain = {"weight_decay": 0.0} if "weight_decay" in accepted else {}
    return {**plain, **case.options, **more}


def _stacked_state(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[str, Tensor]:
    """As a re-basing hands it over: every tensor with the layers in front."""
    states = [optimizer.state[p] for p in parameters]
    return {
        name: torch.stack([state[name].to(torch.float64) for state in states])
        for name, value in states[0].items()
        if isinstance(value, Tensor)
    }


def _predicted(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
    direction, group = moments_of(optimizer).direction, optimizer.param_groups[0]
    assert direction is not None
    grads = torch.stack([-p.grad if group["maximize"] else p.grad for p in parameters])
    held = torch.stack([p.detach() for p in parameters])
    return direction(held, grads, _stacked_state(optimizer, parameters), group)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 0.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_predicted_direction_is_the_step_that_torch_takes(
    case: OptimizerCase, maximize: bool, lr: float, shape: tuple[int, ...]
) -> None:
    parameter = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    optimizer = case.cls([parameter], lr=lr, **_options(case, maximize=maximize))
    for step in range(STEPS):
        parameter.grad = torch.randn_like(parameter) * 2.0**-step
        predicted = _predicted(optimizer, [parameter])
        before = parameter.detach().clone()
        optimizer.step()
        taken = (before - parameter.detach()) / lr
        torch.testing.assert_close(predicted[0], taken, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_layers_of_a_batch_may_have_taken_different_numbers_of_steps(case: OptimizerCase) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(3)]
    optimizer = case.cls(parameters, lr=0.01, **_options(case))
    for step in range(STEPS):
        for late, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) if step >= 3 * late else None
        optimizer.step()
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    together = _predicted(optimizer, parameters)
    alone = torch.cat([_predicted(optimizer, [parameter]) for parameter in parameters])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    taken = [(old - p.detach()) / 0.01 for old, p in zip(before, parameters, strict=True)]
    torch.testing.assert_close(together, torch.stack(taken), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_a_step_counter_may_be_one_scalar_for_all_layers(case: OptimizerCase) -> None:
    # What a host-side counter becomes on a GPU.
    parameters = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer = case.cls(parameters, lr=0.01, **_options(case))
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    expected = _predicted(optimizer, parameters)
    direction = moments_of(optimizer).direction
    assert direction is not None
    state = _stacked_state(optimizer, parameters)
    state = {name: value[0] if value.ndim == 1 else value for name, value in state.items()}
    held, grads = torch.stack(parameters).detach(), torch.stack([p.grad for p in parameters])
    predicted = direction(held, grads, state, optimizer.param_groups[0])
    torch.testing.assert_close(predicted, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_direction_grows_with_the_gradient_by_its_declared_degree(case: OptimizerCase) -> None:
    # Once a direction does not see eps, U of c g is c^d U of g: what the optimum relies on.
    predicted = []
    for constant in (1.0, 1e3):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        optimizer = case.cls([parameter], lr=0.0, **_options(case))
        for _ in range(STEPS):
            parameter.grad = torch.randn_like(parameter) * constant
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.01
        parameter.grad = torch.randn_like(parameter) * constant
        predicted.append(_predicted(optimizer, [parameter]))
    degree = moments_of(optimizer).direction_degree
    torch.testing.assert_close(predicted[1], predicted[0] * 1e3**degree, rtol=1e-5, atol=0)


def test_radam_starts_as_momentum_and_is_rectified_later() -> None:
    # Guards the test above against passing with one branch alone.
    grad = torch.ones(1, 2, 2, dtype=torch.float64)
    group = {"betas": (0.9, 0.999), "eps": 0.0}
    averages = {"exp_avg": grad * 1e-3, "exp_avg_sq": grad * 1e-6}

    def size_grows_with_history(step: int) -> float:
        state = {**averages, "step": torch.tensor(float(step))}
        larger = {name: value * 4 for name, value in averages.items()} | {"step": state["step"]}
        first = directions.radam(grad, 0 * grad, state, group)
        second = directions.radam(grad, 0 * grad, larger, group)
        return float((second / first).mean())

    assert size_grows_with_history(3) == pytest.approx(4)  # linear in the average alone
    assert size_grows_with_history(50) == pytest.approx(2)  # 4 / sqrt(4)
