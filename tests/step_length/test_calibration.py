"""Calibration: what is typed in as learning rate loses its meaning, a schedule keeps its own."""

from __future__ import annotations

import copy
import functools
import math
from itertools import pairwise
from typing import Any, get_args

import internals
import models
import pytest
import torch
import training
from peft import LoraConfig, get_peft_model
from reference import OPTIMIZERS, OptimizerCase
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scalora
from scalora.peft_layers import lora_pairs
from scalora.step_length.calibration import StepCalibration

WINDOW = 20
RATE = 1e-4


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    """Two LoRA layers and a head that is trained in full."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 6))
    config = LoraConfig(r=3, target_modules=["0", "2"], modules_to_save=["3"])
    return get_peft_model(base.to(dtype), config, autocast_adapter_dtype=False).to(dtype)


def calibrated(model: Any, lr: float | Tensor = RATE, **options: Any) -> scalora.ScaLoRA:
    return training.optimizer_of(model, lr=lr, **{"rule": "leak", "calibration": WINDOW, **options})


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> float:
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    loss = (model(x) - x[:, :6] @ torch.eye(6).to(dtype)).square().mean()
    (scale * loss).backward()
    return loss.item()


train = functools.partial(models.train_by, backward)


def factor_of(optimizer: scalora.ScaLoRA) -> float:
    assert optimizer.step_factor is not None
    return optimizer.step_factor.item()


# The length that is found


class Regression:
    """A linear layer is to become another one, on noisy batches: final error and factor."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        U, V = torch.randn(16, 4, generator=generator), torch.randn(24, 4, generator=generator)
        self.change = U @ V.T / 8

    def trained(self, lr: float, calibration: int, steps: int = 130) -> tuple[float, float]:
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(24, 16, bias=False)), LoraConfig(r=4, target_modules=["0"])
        )
        optimizer = calibrated(model, lr, calibration=calibration)
        [pair] = lora_pairs(model, "default")
        target = pair.base_weight.detach() + self.change
        generator = torch.Generator().manual_seed(4)
        for step in range(steps):
            x = torch.randn(32, 24, generator=generator)
            y = x @ target.T + 0.1 * torch.randn(32, 16, generator=generator)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
        error = (pair.effective_weight() - target).square().mean().item()
        factor = factor_of(optimizer) if calibration else 1.0
        return error, factor


def test_a_small_learning_rate_grows_a_large_one_shrinks_and_both_end_alike() -> None:
    task = Regression()
    rates = (3e-3, 1e-2, 3e-2, 9e-2)
    plain = [task.trained(lr, 0)[0] for lr in rates]
    found = [task.trained(lr, 100) for lr in rates]
    errors, factors = [error for error, _ in found], [factor for _, factor in found]
    assert factors[0] > 3 and factors[-1] < 1
    assert factors == sorted(factors, reverse=True)
    lengths = [lr * factor for lr, factor in zip(rates, factors, strict=True)]
    assert max(lengths) / min(lengths) < 0.5 * rates[-1] / rates[0]
    assert max(errors) < 0.2 * max(plain)
    assert max(errors) / min(errors) < 0.2 * max(plain) / min(plain)


def stepped(calibration: StepCalibration, p: nn.Parameter, gradient: Tensor, step: Tensor) -> float:
    p.grad = gradient
    calibration.observe([p], 1.0)
    with calibration.scaled([p]), torch.no_grad():
        p -= step
    assert calibration.factor is not None
    return calibration.factor.item()


def test_steps_grow_while_they_are_short_beside_the_distance_there_is_to_go() -> None:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    calibration = StepCalibration(steps=60)
    target = torch.tensor([-1.0, -1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    factor, moved, total, path = 1.0, 0.0, torch.zeros_like(p), torch.zeros_like(p)
    found, expected = [], []
    for count in range(45):
        noise = 0.2 * torch.randn(5, generator=generator, dtype=torch.float64)
        gradient = (p.detach() - target).sign() + noise
        step = 1e-3 * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]).double()  # the last stays
        if count:
            total += (factor * 1e-3) ** 2 * gradient
            moved += (factor * 1e-3) ** 2 * (gradient @ path).item()
            wanted = 0.3 * moved / total.abs().sum().item() / 1e-3
            factor = max(factor, min(wanted, 1.25 * factor))
        path += factor * step
        expected.append(factor)
        found.append(stepped(calibration, p, gradient, step))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found[5] == 1 and found[-1] > 10
    assert max(b / a for a, b in pairwise(found)) == pytest.approx(1.25)


def test_steps_shrink_by_a_twentieth_while_the_next_gradient_takes_them_back() -> None:
    p = nn.Parameter(torch.ones(4))
    calibration = StepCalibration(steps=20)
    for _ in range(20):
        factor = stepped(calibration, p, torch.ones(4), torch.full((4,), -0.01))
    # Averages that begin at zero make the first observations count less; two are not enough.
    signs = [(1 - 0.9**count) ** 0.5 for count in range(1, 20)]
    shrinkage = 0.05 * sum(sign for sign in signs if sign > 0.75)
    assert factor == pytest.approx(math.exp(-shrinkage), rel=1e-4)


def test_a_step_that_is_neither_surely_too_short_nor_too_long_is_left_as_it_is() -> None:
    p = nn.Parameter(torch.ones(4))
    calibration = StepCalibration(steps=40)
    for step in range(40):  # asks for more as often as for less
        gradient = torch.ones(4) * (-1) ** (step // 2)
        assert stepped(calibration, p, gradient, 0.01 * gradient) == 1


def test_the_factor_stays_within_its_bounds() -> None:
    p = nn.Parameter(torch.zeros(4))
    calibration = StepCalibration(steps=1000)
    for _ in range(200):
        factor = stepped(calibration, p, torch.ones(4), torch.ones(4))
    assert factor == 1e3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_is_scaled_by_the_factor_in_the_parameters_own_dtype(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = calibrated(model)
    train(model, optimizer, range(15))
    optimizer.zero_grad()
    backward(model, 15)
    twin, plain = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    before = models.parameters(model)
    optimizer.step()
    plain.inner.step()
    assert factor_of(optimizer) != 1
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == dtype
            step = dict(twin.named_parameters())[name] - before[name]
            expected = before[name].double() + factor_of(optimizer) * step.double()
            eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # the factor's
            torch.testing.assert_close(p.double(), expected, rtol=2 * eps, atol=eps * 1e-1)


def test_parameters_of_any_layout_are_scaled_as_one_row_of_their_elements() -> None:
    def stepped(parameters: list[nn.Parameter]) -> tuple[float, Tensor]:
        calibration = StepCalibration(steps=30)
        for count in range(20):
            generator = torch.Generator().manual_seed(count)
            move = torch.randn(84, generator=generator)
            pieces = (0.3 * move + 1).split([p.numel() for p in parameters])
            for p, piece in zip(parameters, pieces, strict=True):
                p.grad = piece.view(p.shape)
            calibration.observe(parameters, 1.0)
            with calibration.scaled(parameters), torch.no_grad():
                for p in parameters:
                    p -= 1e-3 * p.grad
        assert calibration.factor is not None
        row = torch.cat([p.detach().flatten() for p in parameters])
        return calibration.factor.item(), row

    kernel = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors = [torch.zeros(4, 5), torch.zeros(6, 5).T, kernel, torch.zeros(0, 3), torch.zeros(10)]
    factor, row = stepped([nn.Parameter(tensor) for tensor in tensors])
    expected, whole = stepped([nn.Parameter(torch.zeros(84))])
    assert factor == expected > 1
    assert torch.equal(row, whole)


class Operations(TorchDispatchMode):
    """Counts operations that compute something, which views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_parameters_take_no_more_operations(dtype: torch.dtype) -> None:
    def operations(count: int) -> int:
        parameters = [nn.Parameter(torch.ones(2, 3, dtype=dtype)) for _ in range(count)]
        calibration = StepCalibration(steps=10)
        for _ in range(3):
            for p in parameters:
                p.grad = torch.ones_like(p)
            with Operations() as counted:
                calibration.observe(parameters, 1.0)
                with calibration.scaled(parameters):
                    pass
        return counted.count

    assert 10 < operations(3) == operations(30)


def test_only_the_lora_factors_are_scaled_and_not_the_head() -> None:
    model, other = make_model(), make_model()
    optimizer, plain = calibrated(model), torch.optim.AdamW(models.trainable(other), lr=RATE)
    for seed in range(WINDOW):
        optimizer.zero_grad()
        backward(model, seed)
        for p, q in zip(models.trainable(model), models.trainable(other), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    assert factor_of(optimizer) != 1
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if "modules_to_save" in name:
            assert torch.equal(p, q)
        elif "lora_" in name:
            assert not torch.equal(p, q)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_a_constant_on_the_loss_does_not_matter(scale: float) -> None:
    def factor(scale: float) -> float:
        model = make_model(torch.float64)
        inner = torch.optim.AdamW(models.trainable(model), lr=1e-3, eps=1e-30)
        optimizer = scalora.ScaLoRA(inner, model, calibration=WINDOW)
        for seed in range(WINDOW):
            optimizer.zero_grad()
            backward(model, seed, scale)
            optimizer.step()
        return factor_of(optimizer)

    assert factor(scale) == pytest.approx(factor(1.0), rel=1e-9)


# The window


def test_after_the_window_the_factor_is_held_and_a_schedule_keeps_its_shape() -> None:
    model = make_model()
    optimizer = calibrated(model)
    train(model, optimizer, range(WINDOW))
    held = factor_of(optimizer)
    assert held != 1
    for share in (1.0, 0.5, 0.01):
        optimizer.param_groups[0]["lr"] = RATE * share
        train(model, optimizer, range(3))
        assert factor_of(optimizer) == held
    # Nothing but the numbers is kept: no copy of the newest step.
    assert sum(t.numel() for t in internals.run_state(optimizer).calibration.kept_tensors()) == 5


def test_the_window_begins_anew_while_the_learning_rate_rises() -> None:
    p = nn.Parameter(torch.ones(4))
    calibration = StepCalibration(WINDOW)
    factors = []
    for step in range(3 * WINDOW):
        p.grad = torch.ones(4)
        calibration.observe([p], 1e-3 * min(1, (step + 1) / WINDOW))
        with calibration.scaled([p]), torch.no_grad():
            p -= 0.01 * p.grad
        factors.append(calibration.factor.item())
    first, last = 7, WINDOW - 1 + WINDOW  # when it is too short; the peak is at the WINDOW-th step
    assert all(a < b for a, b in pairwise(factors[first:last]))
    assert set(factors[last - 1 :]) == {factors[last - 1]}


def test_a_window_that_opens_again_knows_nothing_of_the_way_before() -> None:
    p = nn.Parameter(torch.ones(4))
    calibration = StepCalibration(WINDOW)
    found = []
    for rate in (1e-3, 2e-3):
        for step in range(2 * WINDOW):
            # At first every gradient asks for more, later only noise is left.
            sign = 1.0 if rate == 1e-3 else (-1.0) ** (step // 2)
            p.grad = sign * torch.ones(4)
            calibration.observe([p], rate)
            with calibration.scaled([p]), torch.no_grad():
                p -= 0.01 * p.grad
        found.append(calibration.factor.item())
    assert found[0] > 1.5
    assert found[1] == found[0]


def test_zero_learning_rate_at_the_first_step_is_no_part_of_the_window() -> None:
    def factors(warm_up: bool) -> list[float]:
        model = make_model(torch.float64)
        inner = torch.optim.SGD(models.trainable(model), lr=0.0 if warm_up else 0.1)
        optimizer = scalora.ScaLoRA(inner, model, calibration=WINDOW, interval=1000)
        if warm_up:
            train(model, optimizer, range(1))
            assert factor_of(optimizer) == 1
            inner.param_groups[0]["lr"] = 0.1
        found = []
        for seed in range(2 * WINDOW):
            train(model, optimizer, range(seed, seed + 1))
            found.append(factor_of(optimizer))
        return found

    assert factors(warm_up=True) == factors(warm_up=False)


def test_a_learning_rate_in_a_host_tensor_is_read() -> None:
    def found(lr: Any) -> float:
        model = make_model()
        optimizer = calibrated(model, lr)
        for step in range(2 * WINDOW):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WINDOW)
            train(model, optimizer, range(step, step + 1))
        return factor_of(optimizer)

    assert found(torch.tensor(1e-3)) == pytest.approx(found(1e-3), rel=1e-5)


@pytest.mark.parametrize("rule", ["auto", "leak", "exact"])
def test_calibration_0_is_no_calibration_to_the_bit(rule: str) -> None:
    model, other = make_model(), make_model()
    optimizer = calibrated(model, rule=rule, calibration=0, interval=1000)
    plain = scalora.ScaLoRA(
        torch.optim.AdamW(models.trainable(other), lr=RATE),
        other,
        **({"rule": "exact", "interval": 1000} if rule == "exact" else {"rule": "none"}),
    )
    train(model, optimizer, range(12))
    train(other, plain, range(12))
    models.assert_same(models.parameters(model), models.parameters(other))
    assert optimizer.step_factor is None


def test_auto_alone_calibrates_unless_asked_for() -> None:
    def steps(**options: Any) -> int:
        model = make_model()
        inner = torch.optim.AdamW(models.trainable(model), lr=1e-3)
        return scalora.ScaLoRA(inner, model, **options).options.calibration_steps

    assert steps() == 100
    assert steps(rule="auto", calibration=7) == 7
    others = set(get_args(scalora.options.Rule)) - {"auto"}
    assert {steps(rule=rule) for rule in others} == {0}
    assert steps(rule="exact", calibration=7) == 7


@pytest.mark.parametrize("rule", ["exact", "direction"])
def test_it_goes_together_with_the_rules_of_scaling(rule: str) -> None:
    model = make_model()
    optimizer = calibrated(model, rule=rule)
    losses = train(model, optimizer, range(40))
    assert losses[-1] < losses[0]
    assert factor_of(optimizer) != 1
    assert optimizer.rebase_count == 40


# What teaches nothing


def test_a_gradient_that_is_not_finite_teaches_nothing() -> None:
    model = make_model()
    optimizer = calibrated(model)
    train(model, optimizer, range(4))
    before, state = factor_of(optimizer), models.parameters(model)
    optimizer.zero_grad()
    backward(model, 4)
    optimizer.rebased_pairs[0].P_parameter.grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert factor_of(optimizer) == before
    models.assert_same(state, models.parameters(model))
    assert all(loss == loss for loss in train(model, optimizer, range(5, 9)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_where_the_device_is_not_waited_for_such_a_gradient_changes_no_factor(value: float) -> None:
    p = nn.Parameter(torch.ones(4))
    calibration = StepCalibration(steps=20)
    factors = []
    for step in range(15):
        gradient = torch.full((4,), value if step == 12 else 1.0)
        # A fused optimizer leaves that step out.
        move = torch.full((4,), 0.0 if step == 12 else 0.01)
        factors.append(stepped(calibration, p, gradient, move))
    assert factors[9] < factors[10] < factors[11] == factors[12]
    assert factors[13] == factors[12]  # the step that was left out
    assert factors[14] > factors[13]
    assert p.isfinite().all()


def test_missing_and_frozen_factors_are_left_alone() -> None:
    model = make_model()
    optimizer = calibrated(model)
    train(model, optimizer, range(12))
    first, second = optimizer.rebased_pairs
    for parameter in (first.P_parameter, first.Q_parameter):
        parameter.requires_grad_(False)
        parameter.grad = None
    before = first.P_parameter.clone(), factor_of(optimizer), second.P_parameter.clone()
    train(model, optimizer, range(12, 18))
    assert torch.equal(first.P_parameter, before[0])
    assert factor_of(optimizer) != before[1]
    assert not torch.equal(second.P_parameter, before[2])


def test_a_step_without_any_gradient_changes_nothing() -> None:
    model = make_model()
    optimizer = calibrated(model)
    train(model, optimizer, range(12))
    before, state = factor_of(optimizer), models.parameters(model)
    optimizer.zero_grad()
    optimizer.step()
    assert factor_of(optimizer) == before
    models.assert_same(state, models.parameters(model))
    train(model, optimizer, range(12, 16))
    assert factor_of(optimizer) != before


def test_a_step_that_raises_leaves_the_parameters_and_can_be_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stepped(fails: int) -> tuple[dict[str, Tensor], float]:
        model = make_model()
        optimizer = calibrated(model, interval=1000)
        train(model, optimizer, range(4))
        optimizer.zero_grad()
        backward(model, 4)
        before = models.parameters(model)
        for _ in range(fails):
            with monkeypatch.context() as patch:
                patch.setattr(optimizer.inner, "step", _fail)
                with pytest.raises(RuntimeError, match="injected"):
                    optimizer.step()
            models.assert_same(before, models.parameters(model))
        optimizer.step()
        train(model, optimizer, range(5, 3 * WINDOW))
        return models.parameters(model), factor_of(optimizer)

    (once, factor), (again, same) = stepped(0), stepped(2)
    assert factor == same
    models.assert_same(once, again)


def _fail() -> None:
    raise RuntimeError("injected")


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gpu_calibration_and_rebasing_never_wait_for_the_device(
    dtype: torch.dtype, fused: bool
) -> None:
    torch.manual_seed(0)
    model = make_model(dtype).to("cuda")
    inner = torch.optim.AdamW(models.trainable(model), lr=1e-3, fused=fused)
    optimizer = scalora.ScaLoRA(inner, model, interval=3)
    for step in range(9):
        for p in models.trainable(model):
            p.grad = torch.randn_like(p)
        torch.cuda.synchronize()
        if step > 2:  # the first allocate
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.rebase_count >= 6


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_held_factor_moves_every_optimizer_by_as_much_as_a_scaled_step(case: OptimizerCase) -> None:
    """Given in the learning rate, where the step is proportional to it, or applied to the step."""

    def trained(head_apart: bool) -> tuple[dict[str, Tensor], float]:
        model = make_model(torch.float64)
        factors = [p for n, p in model.named_parameters() if "lora_" in n]
        head = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
        groups = [{"params": factors}, {"params": head}] if head_apart else [*factors, *head]
        inner = case.cls(groups, lr=1e-3, weight_decay=0.1, **case.options)
        optimizer = scalora.ScaLoRA(inner, model, calibration=3, interval=1000)
        train(model, optimizer, range(4))
        assert optimizer.step_factor is not None
        optimizer.step_factor.fill_(1.75)
        train(model, optimizer, range(4, 10))
        assert {group["lr"] for group in inner.param_groups} == {1e-3}
        return models.parameters(model), factor_of(optimizer)

    (apart, factor), (together, same) = trained(True), trained(False)
    assert factor == same == 1.75
    for name, value in apart.items():
        torch.testing.assert_close(value, together[name], rtol=1e-9, atol=1e-12)


def test_rates_are_put_back_when_a_step_with_a_held_factor_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(factors, lr=1e-3), model, calibration=2)
    train(model, optimizer, range(4))
    seen = []

    def fail() -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        raise RuntimeError("injected")

    assert optimizer.step_factor is not None
    optimizer.step_factor.fill_(2.0)
    monkeypatch.setattr(optimizer.inner, "step", fail)
    with pytest.raises(RuntimeError, match="injected"):
        optimizer.step()
    assert seen == [2e-3]
    assert optimizer.param_groups[0]["lr"] == 1e-3
