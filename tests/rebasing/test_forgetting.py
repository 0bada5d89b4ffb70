"""Scaling P alone: what the adapter remembers, what is frozen, and at what pace."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from typing import Any

import internals
import models
import numpy as np
import pytest
import reference
import torch
import training
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import CASES, TOLERANCE, Case
from peft.optimizers import create_loraplus_optimizer
from reference import OPTIMIZERS, OptimizerCase
from torch import Tensor, nn

import scalora
from scalora.moments import moments_of
from scalora.peft_layers import lora_pairs
from scalora.rebasing.accumulators import DenseAccumulator
from scalora.step_length.rates import LearnedSteps

R = 3
RULES = ("leak", "age", "expected")


def perceptron(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": R, "target_modules": ["first", "second"], **config}
    return models.with_lora(
        models.Perceptron().to(dtype), autocast_adapter_dtype=False, **options
    ).to(dtype)


def scalora_of(model: Any, *, lr: float | Tensor = 1e-2, **options: Any) -> scalora.ScaLoRA:
    options = {"rule": "leak", "interval": 2, "memory": 10, **options}
    return training.optimizer_of(model, lr=lr, adamw={"weight_decay": 0.0}, **options)


def backward(model: nn.Module, step: int) -> float:
    dtype = next(model.parameters()).dtype
    loss = models.loss(model, (models.vectors(16, 12) * (1 + step / 10)).to(dtype))
    loss.backward()
    return loss.item()


train = functools.partial(models.train_by, backward)


def alphas(optimizer: scalora.ScaLoRA) -> dict[str, Tensor]:
    return {name: alpha for name, (alpha, _) in optimizer.last_scaling.items()}


# The pace


def test_steps_are_counted_by_their_share_of_the_highest_rate() -> None:
    learned = LearnedSteps()
    for rate in (0.5, 1.0, 2.0, 1.0, 0.0):  # a warm-up, then a decay
        learned.count([{"lr": rate}, {"lr": 1.0}])
    assert learned.since("layer", 0) == 3.5
    learned.mark(["layer"], 0)
    learned.count([{"lr": 1.0}, {"lr": 1.0}])
    assert learned.since("layer", 0) == 0.5
    assert learned.since("other", 1) == 6
    again = LearnedSteps()
    again.load(learned.saved())
    assert (again.since("layer", 0), again.since("other", 1)) == (0.5, 6)


def test_rate_may_change_from_a_number_to_a_tensor_and_back() -> None:
    learned = LearnedSteps()
    for rate in (2.0, torch.tensor(4.0, dtype=torch.float64), 1.0, torch.tensor(2.0)):
        learned.count([{"lr": rate}])
    assert float(learned.since("layer", 0)) == 2.75
    on_device = LearnedSteps()  # a tensor that is not on the host is not read
    for peak, rate in ((1.0, 3.0), (torch.tensor(1.0), 3.0), (1.0, torch.tensor(3.0))):
        on_device._peaks, on_device._counts = [peak], [0.0]
        assert float(on_device.peak(0, rate)) == 3.0


def test_rates_of_zero_count_nothing() -> None:
    learned = LearnedSteps()
    learned.count([{"lr": 0.0}])
    assert learned.since("layer", 0) == 0


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_alpha_follows_the_schedule_of_the_layers_own_group(kind: Any) -> None:
    model = perceptron()
    first, second = lora_pairs(model, "default")
    groups = [
        {"params": [first.P_parameter, first.Q_parameter], "lr": kind(1e-2)},
        {"params": [second.P_parameter, second.Q_parameter], "lr": kind(1e-3)},
    ]
    inner = torch.optim.AdamW(groups)
    optimizer = scalora.ScaLoRA(inner, model, rule="leak", interval=5, memory=10)
    train(model, optimizer, range(5))
    assert alphas(optimizer)["first"].tolist() == pytest.approx([0.9**4] * R)
    groups[0]["lr"] = inner.param_groups[0]["lr"] = kind(5e-3)
    train(model, optimizer, range(5, 10))
    # One whole step, taken after the re-basing, and four halves.
    assert alphas(optimizer)["first"].tolist() == pytest.approx([0.9**3] * R)
    assert alphas(optimizer)["second"].tolist() == pytest.approx([0.9**5] * R)


def test_layer_that_took_no_part_forgets_what_it_learned_when_its_turn_comes() -> None:
    model = perceptron()
    optimizer = scalora_of(model, interval=2)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        if step == 1:
            pair = lora_pairs(model, "default")[0]
            pair.P_parameter.grad = pair.Q_parameter.grad = None
        optimizer.step()
    assert alphas(optimizer)["first"].tolist() == pytest.approx([0.9**3] * R)
    assert alphas(optimizer)["second"].tolist() == pytest.approx([0.9**2] * R)


def test_first_step_of_all_has_nothing_to_forget() -> None:
    model = perceptron()
    optimizer = scalora_of(model, interval=1)
    train(model, optimizer, range(1))
    assert optimizer.last_scaling == {}
    train(model, optimizer, range(1, 2))
    assert alphas(optimizer)["first"].tolist() == pytest.approx([0.9] * R)


@pytest.mark.parametrize(("memory", "interval"), [("auto", 10), (50, 5), (7, 1), (1.5, 1)])
def test_interval_follows_the_memory(memory: Any, interval: int) -> None:
    def found(interval: Any) -> int:
        return scalora_of(perceptron(), memory=memory, interval=interval).options.interval_steps

    assert found("auto") == interval
    assert found(3) == 3


def test_other_rules_rebase_at_every_step_by_default() -> None:
    assert training.optimizer_of(perceptron(), rule="exact").options.interval_steps == 1


def test_age_bounds_the_columns_at_the_memory() -> None:
    model = perceptron()
    optimizer = scalora_of(model, rule="age", interval=1, memory=3)
    train(model, optimizer, range(30))
    assert all((alpha <= 1).all() and (alpha < 1).any() for alpha in alphas(optimizer).values())
    rate = optimizer.param_groups[0]["lr"]
    for pair in optimizer.rebased_pairs:
        # Adam moves no entry by much more than its rate: K steps, and the one after the re-basing.
        longest = 4 * rate * pair.P_parameter.shape[0] ** 0.5
        assert (pair.P_parameter.norm(dim=0) < 2 * longest).all()


def adam_direction(state: dict[str, Tensor], g: Tensor) -> np.ndarray:
    """Return the direction of Adam's coming step if its gradient is g."""
    step = float(state["step"]) + 1
    first = (0.9 * state["exp_avg"] + 0.1 * g) / (1 - 0.9**step)
    second = (0.999 * state["exp_avg_sq"] + 0.001 * g**2) / (1 - 0.999**step)
    return (first / (second.sqrt() + 1e-8)).numpy()


def momentum_direction(state: dict[str, Tensor], g: Tensor) -> np.ndarray:
    return (0.9 * state["momentum_buffer"] + g).numpy()


ADAM = torch.optim.AdamW, {"weight_decay": 0.0}, adam_direction, 0
MOMENTUM = torch.optim.SGD, {"momentum": 0.9}, momentum_direction, 1


@pytest.mark.parametrize("sign", [1, -1], ids=["minimize", "maximize"])
@pytest.mark.parametrize(
    ("cls", "options", "direction", "degree"), [ADAM, MOMENTUM], ids=["Adam", "momentum"]
)
def test_optimum_in_expectation_is_the_references(
    cls: Any, options: Any, direction: Any, degree: int, sign: int
) -> None:
    model = perceptron(torch.float64, init_lora_weights=False)
    inner = cls(models.trainable(model), lr=1e-2, maximize=sign < 0, **options)
    optimizer = scalora.ScaLoRA(inner, model, rule="expected", memory=3, interval=1)
    train(model, optimizer, range(1))
    means = {pair.name: np.zeros((2, R)) for pair in optimizer.rebased_pairs}
    for count in range(1, 5):
        optimizer.zero_grad()
        backward(model, count)
        wanted = {}
        for pair in optimizer.rebased_pairs:
            P, Q = pair.P_parameter, pair.Q_parameter
            assert P.grad is not None and Q.grad is not None
            step = 1e-2 * direction(inner.state[P], sign * P.grad)
            earlier = direction(inner.state[Q], torch.zeros_like(Q)).T
            old = P.detach().numpy()
            new = reference.descent(old, sign * Q.grad.numpy().T, earlier, degree)
            means[pair.name] = 0.98 * means[pair.name] + 0.02 * new
            longest = 3 * np.sqrt((step**2).sum() / R)
            lengths = longest * reference.shares(means[pair.name], degree)
            wanted[pair.name] = np.clip(lengths / np.linalg.norm(old, axis=0), 1e-3, 1)
        optimizer.step()
        for name, alpha in alphas(optimizer).items():
            np.testing.assert_allclose(alpha.numpy(), wanted[name], rtol=1e-9)


@pytest.mark.parametrize(
    ("cls", "options", "r"),
    [(torch.optim.AdamW, {}, 1), (torch.optim.SGD, {}, R), (torch.optim.RMSprop, {}, R)],
)
def test_expected_is_age_where_there_is_nothing_to_share_out(
    cls: Any, options: Any, r: int
) -> None:
    def trained(rule: str) -> dict[str, Tensor]:
        model = perceptron(r=r)
        inner = cls(models.trainable(model), lr=1e-2, **options)
        optimizer = scalora.ScaLoRA(inner, model, rule=rule, memory=2, interval=1)
        train(model, optimizer, range(6))
        assert all((alpha < 1).any() for alpha in alphas(optimizer).values())
        return training.effective_weights(optimizer)

    torch.testing.assert_close(trained("expected"), trained("age"))


def test_what_was_measured_is_kept_only_of_layers_that_were_rebased(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = perceptron()
    optimizer = scalora_of(model, rule="expected", interval=1)
    train(model, optimizer, range(3))

    def measured() -> list[Tensor]:
        layers = optimizer.state_dict()["scalora"]["layers"].values()
        return [layer["measured"].clone() for layer in layers]

    before = measured()
    optimizer.zero_grad()
    backward(model, 3)
    with monkeypatch.context() as patched:
        patched.setattr(DenseAccumulator, "commit", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert all(map(torch.equal, measured(), before))
    optimizer.step()
    assert not any(map(torch.equal, measured(), before))


def failing(*_: Any) -> None:
    raise RuntimeError("out of memory")


# What a re-basing leaves as it was


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_function_is_preserved_on_every_kind_of_layer(case: Case, rule: str) -> None:
    model, inputs = case.model(torch.float32), case.batch(torch.float32)
    optimizer = scalora_of(model, rule=rule, memory=2, interval=1000)
    models.train(model, optimizer, inputs, steps=4)
    models.loss(model, inputs).backward()
    before = models.answers(model, inputs)
    bases = {n: models.layer(model, n).get_base_layer().weight.clone() for n in case.layers}
    internals.rebase(optimizer, 1)
    torch.testing.assert_close(
        models.answers(model, inputs), before, rtol=0, atol=TOLERANCE[torch.float32]
    )
    for name, base in bases.items():
        assert (alphas(optimizer)[name] < 1).any()
        assert not torch.equal(models.layer(model, name).get_base_layer().weight, base), name


@pytest.mark.parametrize("rule", RULES)
def test_function_is_preserved_beside_a_carry(rule: str) -> None:
    model = perceptron()
    # Room for what is learned: a compression cuts nothing then.
    options = {"accumulator": "carry", "carry_rank": 32, "memory": 2, "interval": 1}
    optimizer = scalora_of(model, rule=rule, **options)
    inputs = models.vectors(16, 12)
    train(model, optimizer, range(5))
    for step in range(5, 20):  # a carry is full meanwhile
        optimizer.zero_grad()
        backward(model, step)
        before = model(inputs)
        internals.rebase(optimizer, step)
        torch.testing.assert_close(model(inputs), before, rtol=0, atol=1e-5)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_factors_lose_nothing_to_the_carry(dtype: torch.dtype) -> None:
    model = perceptron(dtype)
    optimizer = scalora_of(model, accumulator="carry", memory=3, interval=1000, lr=1e-3)
    optimizer.param_groups[0]["eps"] = 1e-4  # float16 has nothing as small as Adam's own
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    backward(model, 4)
    before = [pair.effective_weight() for pair in optimizer.rebased_pairs]
    internals.rebase(optimizer, 1)
    for pair, old in zip(optimizer.rebased_pairs, before, strict=True):
        assert pair.carry is not None and pair.carry.columns == R
        torch.testing.assert_close(pair.effective_weight(), old, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_Q_stays_and_P_is_scaled(rule: str) -> None:
    model = perceptron()
    optimizer = scalora_of(model, rule=rule, memory=2)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    old = [
        (p.P_parameter.detach().clone(), p.Q_parameter.detach().clone(), p.effective_weight())
        for p in optimizer.rebased_pairs
    ]
    internals.rebase(optimizer, 1)
    for pair, (P, Q, weight) in zip(optimizer.rebased_pairs, old, strict=True):
        alpha, beta = optimizer.last_scaling[pair.name]
        assert (alpha < 1).any() and (beta == 1).all()
        torch.testing.assert_close(pair.P_parameter.detach(), P * alpha.float())
        assert torch.equal(pair.Q_parameter, Q)
        torch.testing.assert_close(pair.effective_weight(), weight, rtol=0, atol=1e-6)


@given(
    st.lists(st.sampled_from([0.0, 1e-3, 3e-3, 1e-2]), min_size=1, max_size=6),
    st.sampled_from([1.5, 4.0, 100.0]),
    st.sampled_from([1, 3, 16]),
)
@settings(max_examples=25)
def test_rebasing_of_a_schedule_is_the_references(
    rates: list[float], memory: float, lora_alpha: int
) -> None:
    model = perceptron(torch.float64, lora_alpha=lora_alpha, init_lora_weights=False)
    optimizer = scalora_of(model, memory=memory, interval=1000)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, [step])
    before = [
        [t.detach().numpy().copy() for t in (p.base_weight, p.P_parameter, p.Q_parameter.T)]
        for p in optimizer.rebased_pairs
    ]
    optimizer.zero_grad()
    backward(model, 9)
    optimizer.param_groups[0]["lr"] = 1e-2  # at 0 nothing is re-based
    internals.rebase(optimizer, 1)
    alpha = np.full(R, reference.leak(rates, memory))
    for pair, (W, P, Q) in zip(optimizer.rebased_pairs, before, strict=True):
        W, P = reference.frozen(W, P, Q, alpha, lora_alpha / R)
        np.testing.assert_allclose(pair.base_weight.numpy(), W, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(pair.P_parameter.detach().numpy(), P, rtol=1e-12)
        assert np.array_equal(pair.Q_parameter.detach().numpy().T, Q)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_moments_of_Q_move_with_alpha_and_those_of_P_stay(case: OptimizerCase) -> None:
    model = perceptron()
    inner = case.cls(models.trainable(model), lr=1e-2, **case.options)
    optimizer = scalora.ScaLoRA(inner, model, rule="leak", memory=3, interval=1000)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    moments = moments_of(inner)
    old = {p: moments.stacked_states(inner, [p]) for p in models.trainable(model)}
    gradients = {p: p.grad.clone() for p in models.trainable(model) if p.grad is not None}
    internals.rebase(optimizer, 1)
    for pair in optimizer.rebased_pairs:
        alpha = optimizer.last_scaling[pair.name][0]
        P, Q = pair.P_parameter, pair.Q_parameter
        assert P.grad is not None and Q.grad is not None
        assert torch.equal(P.grad, gradients[P])
        torch.testing.assert_close(Q.grad, gradients[Q] * alpha.float()[:, None])
        for name, found in moments.stacked_states(inner, [P]).items():
            assert torch.equal(found, old[P][name]), name
        for name, found in moments.stacked_states(inner, [Q]).items():
            if name == "col_var":  # averaged over the columns: tests/moments/test_moments.py
                continue
            wanted = (
                reference.transferred(old[Q][name].numpy(), alpha.numpy(), moments.degrees[name], 1)
                if found.ndim > 1
                else old[Q][name].numpy()
            )
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("rule", "calibration"), [("leak", 0), ("leak", 10), ("age", "auto"), ("expected", "auto")]
)
@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_training_with_every_optimizer_lowers_the_loss(
    case: OptimizerCase, rule: str, calibration: Any
) -> None:
    model = perceptron()
    rate = 0.1 if case.cls is torch.optim.SGD else 1e-2
    inner = case.cls(models.trainable(model), lr=rate, **case.options)
    options = {"memory": 10, "interval": 2, "calibration": calibration}
    optimizer = scalora.ScaLoRA(inner, model, rule=rule, **options)
    inputs = models.vectors(16, 12)
    losses = models.train(model, optimizer, inputs, steps=40)
    assert optimizer.rebase_count == 20
    assert losses[-1] < losses[0]


def weights_after(
    optimizer: scalora.ScaLoRA, scale: float = 1.0, of_layers: str = ""
) -> dict[str, Tensor]:
    """Return the weights after a few steps with some layers' gradients in another unit."""
    for group in optimizer.param_groups:
        group["eps"] = 1e-30
    for step in range(8):
        optimizer.zero_grad()
        backward(optimizer.model, step)
        for name, p in optimizer.model.named_parameters():
            if p.grad is not None and of_layers in name:
                p.grad *= scale
        optimizer.step()
    return training.effective_weights(optimizer)


@pytest.mark.parametrize("of_layers", ["", "second"], ids=["every layer", "one layer"])
def test_gradients_in_other_units_change_nothing(of_layers: str) -> None:
    """Adam's steps do not depend on the size of gradients, and nor does what is frozen."""
    one = weights_after(scalora_of(perceptron()))
    other = weights_after(scalora_of(perceptron()), 1024.0, of_layers)
    torch.testing.assert_close(one, other)


def test_another_alpha_of_lora_with_the_rate_of_P_to_match_changes_nothing() -> None:
    """Four times s, a quarter of P: the product, and the share that is frozen, are the same."""

    def trained(times: float) -> dict[str, Tensor]:
        model = perceptron(lora_alpha=R * times)
        pairs = list(lora_pairs(model, "default"))
        groups = [
            {"params": [pair.P_parameter for pair in pairs], "lr": 1e-2 / times},
            {"params": [pair.Q_parameter for pair in pairs], "lr": 1e-2},
        ]
        inner = torch.optim.AdamW(groups, weight_decay=0.0)
        return weights_after(scalora.ScaLoRA(inner, model, rule="leak", interval=2, memory=10))

    torch.testing.assert_close(trained(1), trained(4))


def test_lora_plus_forgets_at_the_pace_of_the_group_of_P() -> None:
    model = perceptron()
    inner = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    optimizer = scalora.ScaLoRA(inner, model, interval=2, memory=10)
    train(model, optimizer, range(4))
    of_P = {id(pair.P_parameter) for pair in optimizer.rebased_pairs}
    [group] = [g for g in inner.param_groups if of_P & set(map(id, g["params"]))]
    group["lr"] /= 2
    train(model, optimizer, range(4, 6))
    for alpha in alphas(optimizer).values():
        assert alpha.tolist() == pytest.approx([reference.leak([2.0, 1.0], 10)] * R)


def test_non_finite_factor_keeps_its_base_and_the_other_layers_go_on() -> None:
    model = perceptron()
    optimizer = scalora_of(model, interval=1000)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    first, second = optimizer.rebased_pairs
    bases = [pair.base_weight.clone() for pair in (first, second)]
    with torch.no_grad():
        first.Q_parameter[0, 0] = torch.inf
    internals.rebase(optimizer, 1)
    assert torch.equal(first.base_weight, bases[0])
    assert not torch.equal(second.base_weight, bases[1])
    assert (alphas(optimizer)["first"] == 1).all() and (alphas(optimizer)["second"] < 1).all()


# A run


@pytest.mark.parametrize("accumulator", ["dense", "carry"])
@pytest.mark.parametrize("rule", RULES)
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(rule: str, accumulator: str) -> None:
    calibration = 6 if rule == "leak" else "auto"
    options = {"rule": rule, "interval": 3, "accumulator": accumulator, "calibration": calibration}

    def run() -> tuple[Any, scalora.ScaLoRA, Any]:
        model = perceptron()
        optimizer = scalora_of(model, **options)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 4) * max(0.1, 1 - step / 20)
        )
        return model, optimizer, schedule

    def advance(run: tuple[Any, scalora.ScaLoRA, Any], steps: range) -> list[float]:
        model, optimizer, schedule = run
        losses = []
        for step in steps:
            losses += train(model, optimizer, range(step, step + 1))
            schedule.step()
        return losses

    whole = run()
    advance(whole, range(10))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    file.seek(0)
    resumed = run()
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    assert advance(resumed, range(10, 20)) == advance(whole, range(10, 20))
    for one, other in zip(resumed[1].rebased_pairs, whole[1].rebased_pairs, strict=True):
        assert torch.equal(one.effective_weight(), other.effective_weight())


def test_state_of_another_memory_is_refused() -> None:
    model = perceptron()
    optimizer = scalora_of(model, memory=10)
    train(model, optimizer, range(3))
    other = scalora_of(perceptron(), memory=20)
    with pytest.raises(ValueError, match=r"memory=10\.0.*memory=20\.0"):
        other.load_state_dict(optimizer.state_dict())


def test_run_of_60_steps_rebases_at_the_defaults() -> None:
    model = perceptron()
    optimizer = training.optimizer_of(model, lr=1e-3, rule="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, optimizer, range(60))
    assert optimizer.rebase_count == 6
    for pair in optimizer.rebased_pairs:
        assert alphas(optimizer)[pair.name].tolist() == pytest.approx([0.99**10] * R)


@pytest.mark.parametrize("rule", RULES)
def test_rank_of_the_change_grows_beyond_the_adapters(rule: str) -> None:
    model = perceptron()
    base = copy.deepcopy([pair.base_weight for pair in lora_pairs(model, "default")])
    optimizer = scalora_of(model, rule=rule, memory=3, interval=1, lr=3e-2)
    for step in range(60):
        optimizer.zero_grad()
        torch.manual_seed(step)
        models.loss(model, torch.randn(16, 12)).backward()
        optimizer.step()
    for pair, old in zip(optimizer.rebased_pairs, base, strict=True):
        singular = torch.linalg.svdvals(pair.effective_weight() - old)
        assert (singular > 0.02 * singular[0]).sum() > R


@pytest.mark.parametrize("rule", ["age", "expected"])
def test_bounded_lengths_need_the_direction_of_the_optimizer(rule: str) -> None:
    class Mine(torch.optim.AdamW):
        pass

    scalora.register_moments(Mine, {"step": 0, "exp_avg": 1, "exp_avg_sq": 2})
    model = perceptron()
    inner = Mine(models.trainable(model))
    with pytest.raises(ValueError, match="which way Mine will step"):
        scalora.ScaLoRA(inner, model, rule=rule)
    scalora.ScaLoRA(inner, model)


@pytest.mark.parametrize("pair_index", [0, 1, 2])
def test_options_of_the_rule_are_what_was_asked_for(pair_index: int) -> None:
    optimizer = scalora_of(perceptron(), memory="auto", rule=RULES[pair_index])
    assert optimizer.options.memory_steps == (100, 15, 15)[pair_index]


def test_no_column_vanishes_however_short_the_memory() -> None:
    for options, least in (({}, 1e-3), ({"bound": 4.0}, 0.25)):
        model = perceptron()
        optimizer = scalora_of(model, memory=1.001, interval=8, **options)
        train(model, optimizer, range(8))
        assert alphas(optimizer)["first"].tolist() == pytest.approx([least] * R)
