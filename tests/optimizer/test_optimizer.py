"""The wrapper as a torch optimizer: swap, schedule, refuse."""

from __future__ import annotations

import warnings

import accelerate
import internals
import models
import pytest
import torch
from torch import nn
from two_layers import adamw, backward, copy_with_gradients, make_model, rebasing, train

import scalora
from scalora.peft_layers import lora_pairs

# The swap


def test_groups_state_and_defaults_are_the_inner_optimizers_own():
    model = make_model()
    inner = adamw(model)
    optimizer = rebasing(inner, model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.inner is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults


def test_pefts_spelling_makes_the_same_optimizer():
    one, other = make_model(), make_model()
    by_hand = rebasing(adamw(one, weight_decay=0.1), one, interval=2)
    created = scalora.create_scalora_optimizer(
        other, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, rule="exact", interval=2
    )
    assert train(one, by_hand, range(6)) == train(other, created, range(6))


def test_rule_none_is_the_inner_optimizer_to_the_bit():
    one, other = make_model(), make_model()
    train(one, adamw(one), range(10))
    train(other, rebasing(adamw(other), other, rule="none"), range(10))
    models.assert_same(models.parameters(one), models.parameters(other))


def test_parameters_of_no_lora_layer_step_as_the_inner_optimizer_alone():
    one, other = make_model(), make_model()
    plain, wrapped = adamw(one), rebasing(adamw(other), other)
    for seed in range(8):
        backward(one, seed)
        for a, b in zip(models.trainable(one), models.trainable(other), strict=True):
            b.grad = a.grad.clone()
        plain.step()
        wrapped.step()
        plain.zero_grad()
        wrapped.zero_grad()
        heads = [
            m.base_model.model[4].modules_to_save["default"].weight.detach() for m in (one, other)
        ]
        assert torch.equal(*heads)
    assert wrapped.rebase_count == 8


def test_interval_counts_steps():
    model = make_model()
    optimizer = rebasing(adamw(model), model, interval=3)
    counts = []
    for seed in range(7):
        train(model, optimizer, range(seed, seed + 1))
        counts.append(optimizer.rebase_count)
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_last_scaling_names_layers_as_the_base_model_does():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    assert optimizer.last_scaling == {}
    train(model, optimizer, range(3))
    assert set(optimizer.last_scaling) == {"0", "2"}
    alpha, beta = optimizer.last_scaling["0"]
    assert alpha.shape == beta.shape == (3,)
    assert (alpha > 0).all() and (beta > 0).all()


@pytest.mark.parametrize("rule", ["paper", "exact", "direction", "scalar"])
def test_first_step_finds_nothing_to_scale(rule):
    model = make_model(from_zero=True)
    optimizer = rebasing(adamw(model), model, rule=rule)
    train(model, optimizer, range(1))
    for alpha, beta in optimizer.last_scaling.values():
        assert torch.equal(alpha, torch.ones_like(alpha))
        assert torch.equal(beta, torch.ones_like(beta))


@pytest.mark.parametrize("rule", ["exact", "paper", "scalar"])
@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda m: adamw(m, weight_decay=0.0), lambda m: torch.optim.SGD(models.trainable(m), lr=0.5)],
    ids=["AdamW", "SGD"],
)
def test_first_rebasing_makes_the_coming_step_as_long_as_plain_loras(make, from_zero, rule):
    model = make_model(torch.float64, from_zero=from_zero)
    optimizer = rebasing(make(model), model, rule=rule, interval=4, bound=1e9)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    [pair] = [p for p in lora_pairs(model, "default") if p.name == "0"]
    P, Q = pair.P_parameter, pair.Q_parameter

    plain_model, plain = copy_with_gradients(model, optimizer)
    [plain_pair] = [p for p in lora_pairs(plain_model, "default") if p.name == "0"]
    old_P, old_Q = P.detach().clone(), Q.detach().clone()
    plain.inner.step()
    step_P = plain_pair.P_parameter.detach() - old_P
    step_Q = plain_pair.Q_parameter.detach() - old_Q
    expected = (step_P @ old_Q + old_P @ step_Q).norm().item()

    internals.rebase(optimizer)
    new_P, new_Q = P.detach().clone(), Q.detach().clone()
    optimizer.inner.step()
    taken = ((P - new_P) @ new_Q + new_P @ (Q - new_Q)).norm().item()
    assert taken == pytest.approx(expected, rel=1e-5)
    assert not torch.equal(old_P, new_P)


@pytest.mark.parametrize("rule", ["paper", "exact", "direction", "scalar"])
def test_every_rule_trains_and_changes_more_than_the_adapters_rank(rule):
    model = make_model()
    start = {pair.name: pair.base_weight.detach().clone() for pair in lora_pairs(model, "default")}
    optimizer = rebasing(adamw(model), model, rule=rule)
    losses = train(model, optimizer, range(60))
    assert losses[-1] < losses[0]
    base = {f"{name}.weight": weight for name, weight in start.items()}
    spectrum = scalora.delta_spectrum(model, base)["0"]
    assert (spectrum > 1e-4 * spectrum[0]).sum() > 3


def test_closure_is_evaluated_once_and_its_loss_returned():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        return backward(model, 0)

    assert optimizer.step(closure) > 0
    assert len(calls) == 1


def test_step_hooks_run():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, range(1))
    assert seen == ["before", "after"]


def test_zero_gradients_do_no_harm():
    model = make_model()
    optimizer = rebasing(torch.optim.SGD(models.trainable(model), lr=0.1), model)
    train(model, optimizer, range(3))
    backward(model, 3)
    for p in models.trainable(model):
        p.grad.zero_()
    before = models.parameters(model)
    optimizer.step()
    models.assert_same(before, models.parameters(model))


def test_layer_without_a_gradient_is_left_alone():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    for name, p in model.named_parameters():
        if ".2.lora_" in name:
            p.grad = None
    before = models.parameters(model)
    optimizer.step()
    after = models.parameters(model)
    assert set(optimizer.last_scaling) == {"0"}
    for name in before:
        if ".2." in name:
            assert torch.equal(before[name], after[name])


def test_equal_seeds_round_equally_and_others_do_not():
    def base_after(seed):
        model = make_model(torch.bfloat16)
        optimizer = rebasing(adamw(model), model, seed=seed)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).bfloat16()
            model(x).float().square().mean().backward()
            optimizer.step()
        return lora_pairs(model, "default")[0].base_weight.detach()

    assert torch.equal(base_after(5), base_after(5))
    assert not torch.equal(base_after(5), base_after(6))


def test_two_peft_models_in_one_module_keep_their_layers_apart():
    towers = nn.ModuleDict({"query": make_model(), "passage": make_model()})
    optimizer = rebasing(torch.optim.SGD(models.trainable(towers), lr=0.1), towers)
    names = [pair.name for pair in optimizer.rebased_pairs]
    assert len(names) == 4
    assert len(set(names)) == 4


# Schedules


def test_schedulers_see_an_ordinary_optimizer():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        for seed in range(5):
            train(model, optimizer, range(seed, seed + 1))
            scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.55)


def scaling_after_changing_the_rate(factor: float, **options) -> torch.Tensor:
    model = make_model()
    optimizer = rebasing(adamw(model), model, **options)
    train(model, optimizer, range(5))
    for group in optimizer.param_groups:
        group["lr"] *= factor
    train(model, optimizer, range(5, 6))
    return torch.cat(optimizer.last_scaling["0"])


def test_calibrated_product_is_held_so_a_schedule_keeps_its_meaning():
    torch.testing.assert_close(
        scaling_after_changing_the_rate(0.01), scaling_after_changing_the_rate(1.0)
    )


def test_direction_rule_keeps_the_schedules_meaning():
    torch.testing.assert_close(
        scaling_after_changing_the_rate(0.01, rule="direction"),
        scaling_after_changing_the_rate(1.0, rule="direction"),
    )


def test_fixed_lipschitz_constant_answers_a_smaller_rate_with_a_larger_scaling():
    fixed = {"lipschitz": 10.0, "bound": 1e9}
    torch.testing.assert_close(
        scaling_after_changing_the_rate(0.01, **fixed),
        10 * scaling_after_changing_the_rate(1.0, **fixed),
    )


def test_zero_learning_rate_leaves_every_layer_alone():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = models.parameters(model)
    train(model, optimizer, range(3, 4))
    models.assert_same(before, models.parameters(model))


# Mixed precision and accelerate


def test_grad_scaler_skips_and_goes_on():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=generator)
        loss = model(x).square().mean()
        scaler.scale(loss * (torch.inf if step == 3 else 1.0)).backward()
        before = models.parameters(model)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            models.assert_same(before, models.parameters(model))
    assert optimizer.rebase_count == 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_accelerate_prepares_it_like_any_optimizer():
    bare, prepared = make_model(), make_model()
    losses = train(bare, rebasing(adamw(bare), bare), range(8))
    accelerator = accelerate.Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(prepared, rebasing(adamw(prepared), prepared))
    assert train(wrapped, optimizer, range(8)) == losses
    assert optimizer.optimizer.rebase_count == 8


# Errors


class Unknown(torch.optim.SGD):
    """A subclass may keep other state."""


def test_unknown_optimizer_is_refused_by_name_and_can_be_registered():
    model = make_model()
    with pytest.raises(TypeError, match=r"Unknown.*register_moments"):
        scalora.ScaLoRA(Unknown(models.trainable(model), lr=0.1), model)

    class Registered(torch.optim.SGD):
        pass

    scalora.register_moments(Registered, {"momentum_buffer": 1}, direction_degree=1)
    optimizer = scalora.ScaLoRA(
        Registered(models.trainable(model), lr=0.1, momentum=0.9), model, rule="exact"
    )
    train(model, optimizer, range(3))
    with pytest.raises(ValueError, match="direction"):
        scalora.ScaLoRA(Registered(models.trainable(model), lr=0.1), model, rule="direction")


def test_state_of_unknown_degree_is_refused_and_nothing_changed():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(2))
    backward(model, 2)
    for p in models.trainable(model):
        optimizer.state[p]["drift"] = torch.zeros_like(p)
    before = models.parameters(model)
    with pytest.raises(TypeError, match="'drift'"):
        optimizer.step()
    models.assert_same(before, models.parameters(model))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"interval": 0}, ValueError, "interval"),
        ({"interval": 1.5}, TypeError, "interval"),
        ({"rule": "best"}, ValueError, "rule"),
        ({"rule": "direction", "lipschitz": 1.0}, ValueError, "lipschitz"),
        ({"rule": "none", "lipschitz": "auto"}, ValueError, "lipschitz"),
        ({"lipschitz": -1.0}, ValueError, "lipschitz"),
        ({"lipschitz": "high"}, ValueError, "lipschitz"),
        ({"accumulator": "sparse"}, ValueError, "accumulator"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"bound": 0.5}, ValueError, "bound"),
        ({"rule": "leak", "lipschitz": 1.0}, ValueError, "lipschitz"),
        ({"interval": "often"}, ValueError, "interval"),
        ({"rule": "auto", "memory": 1}, ValueError, "memory"),
        ({"rule": "auto", "memory": float("inf")}, ValueError, "memory"),
        ({"rule": "auto", "memory": "long"}, ValueError, "memory"),
        ({"rule": "auto", "memory": True}, TypeError, "memory"),
        ({"rule": "exact", "memory": 50}, ValueError, "memory"),
        ({"calibration": -1}, ValueError, "calibration"),
        ({"calibration": "always"}, ValueError, "calibration"),
        ({"calibration": 2.5}, TypeError, "calibration"),
        ({"calibration": True}, TypeError, "calibration"),
        ({"adapter_name": "other"}, ValueError, r"'other'.*\['default'\]"),
    ],
)
def test_wrong_options_say_which_and_what_to_do(options, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        rebasing(adamw(model), model, **options)


def test_wrong_arguments_are_refused():
    model = make_model()
    optimizer = scalora.ScaLoRA(adamw(model), model)
    with pytest.raises(TypeError, match="already"):
        scalora.ScaLoRA(optimizer, model)
    with pytest.raises(TypeError, match="Optimizer"):
        scalora.ScaLoRA(model, model)
    with pytest.raises(TypeError, match=r"before accelerator\.prepare"):
        scalora.ScaLoRA(accelerate.Accelerator(cpu=True).prepare(adamw(model)), model)
    with pytest.raises(TypeError, match="Module"):
        scalora.ScaLoRA(adamw(model), [1])
    with pytest.raises(TypeError, match="optimizer_cls"):
        scalora.create_scalora_optimizer(model, "adamw", lr=1e-3)
    plain = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        scalora.ScaLoRA(torch.optim.SGD(plain.parameters(), lr=0.1), plain)


def test_repr_says_what_auto_became() -> None:
    model = make_model()
    optimizer = scalora.ScaLoRA(torch.optim.AdamW(models.trainable(model)), model)
    found = repr(optimizer)
    for part in ("rule='leak'", "interval=10", "memory=100.0", "calibration=100"):
        assert part in found
    assert found.endswith("layers: 2 dense)")


def test_step_that_is_skipped_ends_a_state_that_is_in_a_file() -> None:
    """Saved elsewhere after it, the state is whole."""
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    backward(model, 0)
    optimizer.step()
    optimizer.state_is_in_file = True
    assert optimizer.state_dict()["scalora"].keys() >= {"in_file"}
    next(p for p in models.trainable(model) if p.grad is not None).grad.fill_(torch.inf)
    with pytest.warns(UserWarning, match="this step was skipped"):
        optimizer.step()
    assert optimizer.state_dict()["scalora"].keys() >= {"layers", "steps"}
