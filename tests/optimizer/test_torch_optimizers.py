"""Patterns of torch's own tests of its optimizers, with ScaLoRA around every one it knows."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import internals
import models
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from torch_optimizer_inputs import Inputs, torch_optimizer_inputs

import scalora
from scalora.moments.table import _TABLE
from scalora.peft_layers import lora_pairs

NAMES = [cls.__name__ for cls in _TABLE if cls.__module__.startswith("torch.optim")]
REBASING: list[dict[str, Any]] = [
    {"interval": 1},
    {"rule": "exact"},
    {"rule": "exact", "accumulator": "carry"},
]
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_rule = pytest.mark.parametrize("options", REBASING, ids=str)
# The ways to make an optimizer are dealt out to the cases of a test; the slow ones try them all.
dealt = pytest.mark.parametrize(
    "all_ways", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["dealt", "all"]
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return torch_optimizer_inputs(tmp_path_factory.mktemp("torch"))


def made(
    inputs: Inputs, name: str, implementations: bool = False
) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every way in which torch's tests make that optimizer, given its parameters.

    Args:
        implementations: each with ``foreach`` and ``fused`` as well.
    """
    assert len(inputs[name]) >= 5
    for way, arguments in inputs[name]:
        if implementations or "&" not in way:
            yield (
                f"{name}, {way}: {arguments}",
                lambda parameters, kwargs=arguments: getattr(torch.optim, name)(
                    parameters, **copy.deepcopy(kwargs)
                ),
            )


def hand(
    inputs: Inputs, name: str, case: int, cases: int, all_ways: bool
) -> list[tuple[str, Callable[[Any], Any]]]:
    """The ways of `made` that fall to a case when they are dealt out; or all of them."""
    ways = list(made(inputs, name))
    found = ways if all_ways else ways[case::cases]
    assert found
    return found


def perceptron(dtype: torch.dtype = torch.float64) -> Any:
    """Two LoRA layers whose factors are no zeros, and a head that is trained whole."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return models.with_lora(
        base,
        r=2,
        target_modules=["0", "2"],
        modules_to_save=["4"],
        init_lora_weights=False,
    ).to(dtype)


def head(model: Any) -> nn.Linear:
    return model.base_model.model[4].modules_to_save["default"]


BATCHES = list(models.vectors(8, 8, 6).double())


def backward(model: nn.Module, batch: Tensor) -> Tensor:
    value = models.loss(model, batch)
    value.backward()
    return value


train = models.train_on


def same(found: Any, expected: Any) -> bool:
    """To the bit, through dicts and lists."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def test_torchs_list_still_has_every_optimizer_that_is_known(inputs: Inputs) -> None:
    assert set(NAMES) <= inputs.keys()
    assert set(NAMES) == {
        *("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SGD", "RMSprop", "Adagrad", "Adafactor")
    }


# Swapped in for the inner optimizer


@every_optimizer
def test_without_rebasing_every_step_and_state_is_the_inner_optimizers_to_the_bit(
    inputs: Inputs, name: str
) -> None:
    for way, make in made(inputs, name, implementations=True):
        plain_model, model = perceptron(), perceptron()
        plain = make(models.trainable(plain_model))
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, rule="none")
        assert train(model, optimizer, BATCHES[:4]) == train(plain_model, plain, BATCHES[:4]), way
        models.assert_same_bits(model, models.bits(plain_model))
        state = optimizer.state_dict()
        assert state.pop("scalora")
        assert same(state, plain.state_dict()), way


@dealt
@every_rule
@every_optimizer
def test_parameters_of_no_lora_layer_step_as_the_inner_optimizer_would(
    inputs: Inputs, name: str, options: dict[str, Any], all_ways: bool
) -> None:
    for way, make in hand(inputs, name, REBASING.index(options), len(REBASING), all_ways):
        plain_model, model = perceptron(), perceptron()
        plain = make(models.trainable(plain_model))
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, **options)
        for batch in BATCHES[:4]:
            optimizer.zero_grad()
            backward(model, batch)
            for one, other in zip(
                models.trainable(plain_model), models.trainable(model), strict=True
            ):
                one.grad = other.grad.clone()
            plain.step()
            optimizer.step()
            assert torch.equal(head(model).weight, head(plain_model).weight), way
        assert optimizer.rebase_count == 4, way


@every_optimizer
def test_rebasing_keeps_the_function_in_every_way_to_make_the_optimizer(
    inputs: Inputs, name: str
) -> None:
    for way, make in made(inputs, name, implementations=True):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, rule="exact")
        train(model, optimizer, BATCHES[:3])
        optimizer.zero_grad()
        backward(model, BATCHES[3])
        before = {p.name: p.effective_weight().clone() for p in lora_pairs(model, "default")}
        base = {p.name: p.base_weight.clone() for p in lora_pairs(model, "default")}
        internals.rebase(optimizer, optimizer.rebase_count)
        for pair in lora_pairs(model, "default"):
            found = pair.effective_weight()
            torch.testing.assert_close(found, before[pair.name], rtol=0, atol=1e-12, msg=way)
            assert not torch.equal(pair.base_weight, base[pair.name]), way


@dealt
@every_rule
@every_optimizer
def test_steps_go_the_right_way(
    inputs: Inputs, name: str, options: dict[str, Any], all_ways: bool
) -> None:
    for way, make in hand(inputs, name, REBASING.index(options), len(REBASING), all_ways):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, **options)
        sign = -1 if optimizer.defaults["maximize"] else 1
        values = models.train(
            model, optimizer, BATCHES[0], 8, lambda m, x, sign=sign: sign * models.loss(m, x)
        )
        assert sign * (values[-1] - values[0]) < 0, way


# State dicts, copies and pickles


@dealt
@every_rule
@every_optimizer
def test_state_dict_continues_to_the_same_bits(
    inputs: Inputs, name: str, options: dict[str, Any], all_ways: bool
) -> None:
    batches = [batch.float() for batch in BATCHES]  # torch widens a state that it loads: NAdam's
    for way, make in hand(inputs, name, REBASING.index(options), len(REBASING), all_ways):
        model = perceptron(torch.float32)
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, **options)
        train(model, optimizer, batches[:3])
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        expected = train(model, optimizer, batches[3:6])

        other = perceptron(torch.float32)
        other.load_state_dict(weights)
        resumed = scalora.ScaLoRA(make(models.trainable(other)), other, **options)
        resumed.load_state_dict(state)
        assert train(other, resumed, batches[3:6]) == expected, way
        models.assert_same_bits(other, models.bits(model))


CLONES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    lambda pair: pickle.loads(pickle.dumps(pair)),
]


@dealt
@pytest.mark.parametrize("clone", CLONES, ids=["copy", "pickle"])
@every_optimizer
def test_copies_and_pickles_go_on_to_the_same_bits(
    inputs: Inputs, name: str, clone: Callable[[Any], Any], all_ways: bool
) -> None:
    for way, make in hand(inputs, name, CLONES.index(clone), len(CLONES), all_ways):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, rule="exact")
        train(model, optimizer, BATCHES[:2])
        other_model, other = clone((model, optimizer))
        expected = train(model, optimizer, BATCHES[2:4])
        assert train(other_model, other, BATCHES[2:4]) == expected, way


@every_optimizer
def test_named_parameters_keep_their_names_through_a_state_dict(inputs: Inputs, name: str) -> None:
    for way, make in made(inputs, name):
        model = perceptron()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = scalora.ScaLoRA(make(named), model, rule="exact")
        train(model, optimizer, BATCHES[:2])
        state = optimizer.state_dict()
        assert state["param_groups"][0]["param_names"] == [n for n, _ in named], way
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["param_names"] == [n for n, _ in named], way


@every_optimizer
def test_groups_of_another_shape_are_refused_and_nothing_is_loaded(
    inputs: Inputs, name: str
) -> None:
    for way, make in made(inputs, name):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, rule="exact")
        train(model, optimizer, BATCHES[:2])
        state = optimizer.state_dict()
        state["param_groups"] = [*state["param_groups"], dict(state["param_groups"][0])]
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state)
        assert optimizer.rebase_count == 2, way
        train(model, optimizer, BATCHES[2:3])
        assert optimizer.rebase_count == 3, way


# Groups, gradients and closures


@every_optimizer
def test_groups_are_the_inner_optimizers_also_those_added_later(inputs: Inputs, name: str) -> None:
    for way, make in made(inputs, name):
        found = []
        for wrap in (False, True):
            model = perceptron()
            factors = [p for n, p in model.named_parameters() if "lora_" in n]
            inner = make([{"params": factors, "weight_decay": 0.3}])
            optimizer = scalora.ScaLoRA(inner, model, rule="none") if wrap else inner
            optimizer.add_param_group({"params": list(head(model).parameters()), "lr": 0.05})
            train(model, optimizer, BATCHES[:3])
            assert optimizer.param_groups[0]["weight_decay"] == 0.3, way
            found.append(models.bits(model))
        assert same(*found), way


@every_rule
@every_optimizer
def test_step_without_gradients_moves_nothing(
    inputs: Inputs, name: str, options: dict[str, Any]
) -> None:
    for _, make in made(inputs, name):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, **options)
        before = models.bits(model)
        with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
            optimizer.step()
        models.assert_same_bits(model, before)


@pytest.mark.parametrize("set_to_none", [False, True])
@every_optimizer
def test_gradients_are_cleared_as_the_inner_optimizer_clears_them(
    inputs: Inputs, name: str, set_to_none: bool
) -> None:
    for way, make in made(inputs, name):
        model = perceptron()
        optimizer = scalora.ScaLoRA(make(models.trainable(model)), model)
        backward(model, BATCHES[0])
        optimizer.zero_grad(set_to_none)
        for parameter in models.trainable(model):
            assert (parameter.grad is None) == set_to_none, way
            assert set_to_none or not parameter.grad.any(), way


@dealt
@pytest.mark.parametrize("options", REBASING[:2], ids=str)
@every_optimizer
def test_closure_gives_the_steps_that_a_loop_gives(
    inputs: Inputs, name: str, options: dict[str, Any], all_ways: bool
) -> None:
    for way, make in hand(inputs, name, REBASING.index(options), 2, all_ways):
        found = []
        for by_closure in (False, True):
            model = perceptron()
            optimizer = scalora.ScaLoRA(make(models.trainable(model)), model, **options)
            if not by_closure:
                found.append((train(model, optimizer, BATCHES[:3]), models.bits(model)))
                continue
            losses = []
            for batch in BATCHES[:3]:

                def closure(
                    model: Any = model, optimizer: Any = optimizer, batch: Tensor = batch
                ) -> Tensor:
                    assert torch.is_grad_enabled()
                    optimizer.zero_grad()
                    return backward(model, batch)

                with torch.no_grad():
                    losses.append(optimizer.step(closure).item())
            found.append((losses, models.bits(model)))
        assert same(*found), way


# Hooks


def sgd(**options: Any) -> tuple[Any, scalora.ScaLoRA]:
    model = perceptron()
    inner = torch.optim.SGD(models.trainable(model), lr=0.1, momentum=0.9)
    return model, scalora.ScaLoRA(inner, model, **{"rule": "exact", **options})


def test_state_dict_hooks_are_called_in_order_with_the_optimizer_they_are_on() -> None:
    model, optimizer = sgd()
    train(model, optimizer, BATCHES[:1])
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("second", o)))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("first", o)), prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(("last", o, "scalora" in s)))
    optimizer.inner.register_state_dict_pre_hook(lambda o: seen.append(("inner", o)))
    optimizer.state_dict()
    assert seen == [
        ("first", optimizer),
        ("second", optimizer),
        ("inner", optimizer.inner),
        ("last", optimizer, True),
    ]


def test_state_dict_hook_may_add_to_what_is_saved_or_replace_it() -> None:
    _, optimizer = sgd()

    def add(optimizer: Any, state: dict[str, Any]) -> None:
        state["note"] = 1

    first = optimizer.register_state_dict_post_hook(add)
    assert optimizer.state_dict()["note"] == 1
    optimizer.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": 2})
    assert optimizer.state_dict()["note"] == 2
    first.remove()
    optimizer.register_state_dict_post_hook(lambda optimizer, state: None)
    assert optimizer.state_dict()["note"] == 2


def test_load_state_dict_hooks_see_a_copy_and_may_replace_it() -> None:
    model, optimizer = sgd()
    train(model, optimizer, BATCHES[:2])
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.1
    seen: list[Any] = []

    def drop(optimizer: Any, state: dict[str, Any]) -> None:
        seen.append(("before", optimizer.rebase_count))
        del state["scalora"]  # of the copy

    def slower(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**state["param_groups"][0], "lr": 0.03}]}

    optimizer.register_load_state_dict_pre_hook(slower)
    optimizer.register_load_state_dict_pre_hook(drop, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("after", o.rebase_count)))
    with pytest.warns(UserWarning, match="holds nothing of re-basing"):
        optimizer.load_state_dict(state)
    assert seen == [("before", 2), ("after", 0)]
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert "scalora" in state and state["param_groups"][0]["lr"] == 0.1


def test_hook_after_loading_is_not_called_where_the_state_was_refused() -> None:
    model, optimizer = sgd()
    _, other = sgd(seed=1)
    train(model, optimizer, BATCHES[:1])
    other.register_load_state_dict_post_hook(lambda o: pytest.fail("nothing was loaded"))
    with pytest.raises(ValueError, match="seed"):
        other.load_state_dict(optimizer.state_dict())


def test_hooks_of_a_schedule_of_checkpoints_leave_the_state_loadable() -> None:
    """What a framework does with them: put something of its own in, and take it out again."""
    model, optimizer = sgd()
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "rng": torch.get_rng_state()})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: torch.set_rng_state(s.pop("rng"))  # None: the rest is loaded
    )
    train(model, optimizer, BATCHES[:2])
    state = optimizer.state_dict()
    expected = torch.rand(3)
    optimizer.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)
    assert optimizer.rebase_count == 2


@pytest.fixture
def everywhere() -> Iterator[tuple[list[Any], list[RemovableHandle]]]:
    """What torch's global step hooks see, and the hooks."""
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("after", o))),
    ]
    yield seen, handles
    for handle in handles:
        handle.remove()


@every_rule
def test_global_step_hooks_see_one_step_once(
    options: dict[str, Any], everywhere: tuple[list[Any], list[RemovableHandle]]
) -> None:
    seen, _ = everywhere
    model, optimizer = sgd(**options)
    train(model, optimizer, BATCHES[:2])
    assert seen == [("before", optimizer), ("after", optimizer)] * 2


def test_global_step_hooks_see_one_step_once_under_schedules_and_accelerate(
    everywhere: tuple[list[Any], list[RemovableHandle]],
) -> None:
    seen, _ = everywhere
    model, optimizer = sgd()
    lr_scheduler.ConstantLR(optimizer.inner)  # both replace ``step``
    lr_scheduler.ConstantLR(optimizer)
    model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    train(model, prepared, BATCHES[:1])
    assert seen == [("before", optimizer), ("after", optimizer)]


def test_global_step_hooks_see_other_optimizers_that_step_meanwhile(
    everywhere: tuple[list[Any], list[RemovableHandle]],
) -> None:
    seen, _ = everywhere
    model, optimizer = sgd()
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    other = torch.optim.SGD([weight], lr=0.1)
    optimizer.inner.register_step_post_hook(lambda *_: other.step())
    train(model, optimizer, BATCHES[:1])
    assert [o for _, o in seen] == [optimizer, other, other, optimizer]
    optimizer.inner.step()  # by itself
    assert [o for _, o in seen[4:]] == [optimizer.inner, other, other, optimizer.inner]


def test_global_step_hook_that_is_removed_in_a_step_stays_removed(
    everywhere: tuple[list[Any], list[RemovableHandle]],
) -> None:
    seen, handles = everywhere
    model, optimizer = sgd()
    optimizer.inner.register_step_post_hook(lambda *_: handles[1].remove())
    train(model, optimizer, BATCHES[:2])
    assert seen == [("before", optimizer)] * 2


def test_step_that_fails_leaves_the_global_hooks_as_they_were(
    everywhere: tuple[list[Any], list[RemovableHandle]],
) -> None:
    seen, _ = everywhere
    model, optimizer = sgd()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    failing = optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, optimizer, BATCHES[:1])
    failing.remove()
    seen.clear()
    optimizer.inner.step()
    assert seen == [("before", optimizer.inner), ("after", optimizer.inner)]


def test_step_hook_may_change_the_arguments_of_a_step() -> None:
    model, optimizer = sgd()
    optimizer.zero_grad()
    backward(model, BATCHES[0])
    calls: list[Any] = []

    def closure() -> float:
        calls.append("closure")
        return 3.0

    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(args[1]))
    assert optimizer.step() == 3.0
    assert calls == ["closure", closure]


# Schedules


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "CyclicLR, triangular2": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "OneCycleLR, three phases": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10, three_phase=True),
    "ReduceLROnPlateau": plateau,
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.02, 4),
}
every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())


def follow(
    model: Any, optimizer: Any, schedule: Any, batches: list[Tensor]
) -> list[tuple[float, ...]]:
    """(loss, learning rate, momentum) of every step."""
    seen = []
    for batch in batches:
        [value] = train(model, optimizer, [batch])
        schedule.step(*([value] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
        group = optimizer.param_groups[0]
        seen.append((value, float(group["lr"]), float(group["momentum"])))
    return seen


def scheduled(
    make: Callable[[Any], Any], options: dict[str, Any] | None
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Model, optimizer and schedule; a plain SGD where there are no options."""
    if options is None:
        model = perceptron()
        inner = torch.optim.SGD(models.trainable(model), lr=0.1, momentum=0.9)
        return model, inner, make(inner)
    model, optimizer = sgd(**options)
    return model, optimizer, make(optimizer)


def test_every_schedule_of_torch_is_here() -> None:
    here = {name.partition(",")[0] for name in SCHEDULES}
    assert here >= {*lr_scheduler.__all__} - {"LRScheduler"}


@every_schedule
def test_schedule_moves_rates_and_momentum_as_it_does_the_inner_optimizers(
    make: Callable[[Any], Any],
) -> None:
    with warnings.catch_warnings():
        # As an unwrapped optimizer: torch would warn of a schedule before the first step.
        warnings.filterwarnings("error", message="Detected call of `lr_scheduler.step")
        expected = follow(*scheduled(make, None), BATCHES[:8])
        assert follow(*scheduled(make, {"rule": "none"}), BATCHES[:8]) == expected
        for options in REBASING:
            found = follow(*scheduled(make, options), BATCHES[:8])
            if make is not plateau:  # which looks at the loss
                assert [step[1:] for step in found] == [step[1:] for step in expected]


@pytest.mark.parametrize("options", REBASING[:2], ids=str)
@every_schedule
def test_schedule_and_optimizer_resume_to_the_same_bits(
    make: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    model, optimizer, schedule = scheduled(make, options)
    follow(model, optimizer, schedule, BATCHES[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    expected = follow(model, optimizer, schedule, BATCHES[3:8])

    model, optimizer, schedule = scheduled(make, options)
    for part, state in zip((model, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert follow(model, optimizer, schedule, BATCHES[3:8]) == expected
