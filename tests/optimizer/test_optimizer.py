"""The wrapper as a torch optimizer: swap, schedule, save, fail."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import accelerate
import internals
import models
import pytest
import torch
from failing import FailAt
from peft import LoraConfig, get_peft_model
from torch import nn

import scalora
from scalora.peft_layers import lora_pairs
from scalora.rebasing.accumulators import dense


def make_model(dtype: torch.dtype = torch.float32, *, from_zero: bool = False) -> nn.Module:
    """Two LoRA layers and a trained head; both factors random unless ``from_zero``, PEFT's way."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 6)
    )
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0", "2"],
        modules_to_save=["4"],
        init_lora_weights=from_zero,
    )
    return get_peft_model(base.to(dtype), config)


def adamw(model: nn.Module, lr: float = 1e-2, **arguments) -> torch.optim.AdamW:
    return torch.optim.AdamW(models.trainable(model), lr=lr, **arguments)


def rebasing(inner: torch.optim.Optimizer, model: nn.Module, **options) -> scalora.ScaLoRA:
    """With a rule that re-bases every layer at every step."""
    return scalora.ScaLoRA(inner, model, **{"rule": "exact", **options})


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, 12, generator=generator).to(dtype)
    y = torch.randn(32, 6, generator=generator).to(dtype)
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    return loss.detach()


train = functools.partial(models.train_by, backward)


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    return {pair.name: pair.effective_weight().double() for pair in lora_pairs(model, "default")}


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


# Saving and resuming


@pytest.mark.parametrize("options", [{}, {"rule": "direction"}, {"interval": 3}])
def test_state_dict_continues_to_the_same_numbers(options):
    whole = make_model()
    expected = train(whole, rebasing(adamw(whole), whole, **options), range(12))
    first = make_model()
    optimizer = rebasing(adamw(first), first, **options)
    train(first, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make_model()
    resumed = rebasing(adamw(second), second, **options)
    resumed.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["model"])
    assert train(second, resumed, range(7, 12)) == expected[7:]


def test_half_precision_resumes_to_the_same_bits():
    def run(model, optimizer, steps):
        for seed in steps:
            optimizer.zero_grad()
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
            model(x.bfloat16()).float().square().mean().backward()
            optimizer.step()

    whole = make_model(torch.bfloat16)
    run(whole, rebasing(adamw(whole), whole), range(8))
    first = make_model(torch.bfloat16)
    optimizer = rebasing(adamw(first), first)
    run(first, optimizer, range(4))
    second = make_model(torch.bfloat16)
    second.load_state_dict(first.state_dict())
    resumed = rebasing(adamw(second), second)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, range(4, 8))
    models.assert_same(models.parameters(whole), models.parameters(second))


def test_plain_optimizer_state_begins_rebasing_anew():
    model = make_model()
    plain = adamw(model)
    train(model, plain, range(3))
    optimizer = rebasing(adamw(model), model)
    optimizer.load_state_dict(plain.state_dict())
    train(model, optimizer, range(3, 5))
    assert optimizer.rebase_count == 2


def test_state_of_another_rule_seed_or_rank_is_refused_and_nothing_loaded():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    other_rank = get_peft_model(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)),
        LoraConfig(r=2, target_modules=["0", "2"]),
    )
    cases = [
        (rebasing(adamw(model), model, rule="scalar"), "rule"),
        (rebasing(adamw(model), model, seed=1), "seed"),
        (rebasing(adamw(other_rank), other_rank), "rank"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)
        assert not other.state
        assert other.rebase_count == 0


def test_state_on_another_base_is_refused_at_the_first_step():
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    fresh = make_model()
    resumed = rebasing(adamw(fresh), fresh)
    resumed.load_state_dict(optimizer.state_dict())
    before = models.parameters(fresh)
    with pytest.raises(ValueError, match="base weight of '0'"):
        train(fresh, resumed, range(3, 4))
    models.assert_same(before, models.parameters(fresh))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_by_itself(clone):
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(4))
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # it replaces optimizer.step
    other_model, other = clone((model, optimizer))
    assert train(other_model, other, range(4, 7)) == train(model, optimizer, range(4, 7))
    models.assert_same(models.parameters(model), models.parameters(other_model))


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


def test_new_optimizer_on_a_rebased_model_saves_the_base_it_found(tmp_path):
    model = make_model()
    train(model, rebasing(adamw(model), model), range(4))
    second_stage = rebasing(adamw(model), model, interval=100)
    scalora.save_training_state(second_stage, tmp_path)
    adapter = {name: p for name, p in model.state_dict().items() if "base_layer" not in name}
    resumed_model = make_model()
    resumed_model.load_state_dict(adapter, strict=False)
    resumed = rebasing(adamw(resumed_model), resumed_model, interval=100)
    scalora.load_training_state(resumed, tmp_path)
    models.assert_same(models.parameters(model), models.parameters(resumed_model))


def test_two_peft_models_in_one_module_keep_their_layers_apart():
    towers = nn.ModuleDict({"query": make_model(), "passage": make_model()})
    optimizer = rebasing(torch.optim.SGD(models.trainable(towers), lr=0.1), towers)
    names = [pair.name for pair in optimizer.rebased_pairs]
    assert len(names) == 4
    assert len(set(names)) == 4


# All or nothing


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "modules_to_save"])
def test_non_finite_gradient_changes_nothing_and_training_goes_on(value, where):
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    backward(model, 3)
    [*_, parameter] = [p for n, p in model.named_parameters() if where in n and p.requires_grad]
    parameter.grad.view(-1)[0] = value
    before, state = models.parameters(model), copy.deepcopy(optimizer.inner.state_dict()["state"])
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    models.assert_same(before, models.parameters(model))
    for index, moments in optimizer.inner.state_dict()["state"].items():
        models.assert_same(state[index], moments)
    assert optimizer.skipped_steps == 1
    losses = train(model, optimizer, range(4, 8))
    assert all(loss == loss for loss in losses)
    assert optimizer.rebase_count == 3 + 4


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


def coordinates(model: nn.Module, optimizer: scalora.ScaLoRA) -> dict[str, list[torch.Tensor]]:
    """Everything of each layer that must move together."""
    everything = {}
    for pair in lora_pairs(model, "default"):
        tensors = [pair.base_weight]
        for p in (pair.P_parameter, pair.Q_parameter):
            state = optimizer.inner.state[p].values()
            tensors += [p, p.grad, *(value for value in state if isinstance(value, torch.Tensor))]
        everything[pair.name] = [t.detach().clone() for t in tensors]
    return everything


def adamw8bit(model: nn.Module) -> torch.optim.Optimizer:
    optim = pytest.importorskip("bitsandbytes").optim
    return optim.AdamW8bit(models.trainable(model), lr=1e-2, min_8bit_size=1)


# Every second of the operations that write, the others with another error; all in the slow ones.
every_operation = pytest.mark.parametrize(
    "thorough", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dealt", "all"]
)


@every_operation
@pytest.mark.parametrize(
    "dtype, error, inner",
    [
        (torch.float32, torch.OutOfMemoryError, adamw),
        (torch.float32, KeyboardInterrupt, adamw),
        (torch.bfloat16, RuntimeError, adamw),
        (torch.float32, RuntimeError, adamw8bit),
    ],
)
def test_failure_at_any_operation_leaves_every_layer_whole(dtype, error, inner, thorough):
    def prepared():
        model = make_model(dtype)
        optimizer = rebasing(inner(model), model)
        for seed in range(3):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
        optimizer.zero_grad()
        backward(model, 3)
        return model, optimizer

    template = prepared()
    old = coordinates(*template)
    model, optimizer = copy_with_gradients(*template)
    with FailAt(-1, error) as counter:
        internals.rebase(optimizer, optimizer.rebase_count)
    new = coordinates(model, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(old["0"], new["0"], strict=True))

    # The solver's many operations write nothing that lasts: a sample of them will do.
    outcomes = set()
    writing = counter.count - 150
    first, every = (writing, 1) if thorough else (writing + (error is KeyboardInterrupt), 2)
    for k in [*range(1, writing, 25), *range(first, counter.count + 1, every)]:
        model, optimizer = copy_with_gradients(*template)
        with pytest.raises(error), FailAt(k, error):
            internals.rebase(optimizer, optimizer.rebase_count)
        for name, tensors in coordinates(model, optimizer).items():
            is_old = all(torch.equal(a, b) for a, b in zip(tensors, old[name], strict=True))
            is_new = all(torch.equal(a, b) for a, b in zip(tensors, new[name], strict=True))
            assert is_old or is_new, f"{name} torn at operation {k} of {counter.count}"
            outcomes.add("old" if is_old else "new")
    assert outcomes == {"old", "new"}


def copy_with_gradients(model, optimizer):
    gradients = [p.grad for p in model.parameters()]
    model, optimizer = copy.deepcopy((model, optimizer))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    return model, optimizer


def test_failure_right_after_the_fold_still_writes_the_new_coordinates(monkeypatch):
    model = make_model()
    optimizer = rebasing(adamw(model), model)
    train(model, optimizer, range(3))
    backward(model, 3)
    before = effective(model)
    fold = dense.fold

    def interrupted(*args, **kwargs):
        fold(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(dense, "fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for name, weight in effective(model).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)


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
