"""What happens to a model while its optimizer trains it: right, or a clear error, and no loss."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import training
from torch import Tensor, nn
from training import effective_weights

import scalora
from scalora.peft_layers import lora_pairs

INPUTS = models.vectors(16, 12)
INTERVAL = 3
KINDS: dict[str, dict[str, Any]] = {
    "default": {"interval": INTERVAL},
    "default, carry": {"interval": INTERVAL, "accumulator": "carry"},
    "exact": {"rule": "exact"},
    "exact, carry": {"rule": "exact", "accumulator": "carry"},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


def make(options: dict[str, Any], steps: int = 5) -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    # In float16 the default eps is 0.
    adamw = {"weight_decay": 0, "eps": 1e-4}
    optimizer = training.optimizer_of(model, adamw=adamw, **{"rule": "auto", **options})
    models.train(model, optimizer, INPUTS, steps)
    optimizer.zero_grad()
    return model, optimizer


def backward(model: nn.Module) -> None:
    dtype = next(model.parameters()).dtype
    models.loss(model, INPUTS.to(dtype)).backward()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The layers whose effective weight is another, beyond round-off."""
    return {name for name in before if (before[name] - after[name]).abs().max() > 2e-6}


def trains_on(model: nn.Module, optimizer: scalora.ScaLoRA) -> None:
    before, count = effective_weights(optimizer), optimizer.rebase_count
    losses = models.train(model, optimizer, INPUTS.to(next(model.parameters()).dtype), 4)
    assert losses[-1] < losses[0]
    assert moved(before, effective_weights(optimizer)) == before.keys()
    assert optimizer.rebase_count > count


# Gradients


@kinds
def test_batch_of_nan_is_left_out_under_a_warning(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    before = effective_weights(optimizer)
    models.loss(model, torch.full_like(INPUTS, torch.nan)).backward()
    with pytest.warns(UserWarning, match="not finite: this step was skipped"):
        optimizer.step()
    assert moved(before, effective_weights(optimizer)) == set()
    assert optimizer.skipped_steps == 1
    trains_on(model, optimizer)


@kinds
def test_gradients_of_zero_leave_what_momentum_does_not_move(options: dict[str, Any]) -> None:
    model, optimizer = make(options, steps=0)
    for _ in range(2 * INTERVAL):
        optimizer.zero_grad()
        backward(model)
        for p in models.trainable(model):
            p.grad.zero_()
        before = effective_weights(optimizer)
        optimizer.step()
        assert moved(before, effective_weights(optimizer)) == set()
    trains_on(model, optimizer)


@kinds
def test_layer_that_is_frozen_stands_still_and_goes_on_when_it_is_thawed(
    options: dict[str, Any],
) -> None:
    model, optimizer = make(options)
    first = optimizer.rebased_pairs[0]
    factors = (first.P_parameter, first.Q_parameter)
    for factor in factors:
        factor.requires_grad_(False)
    before = effective_weights(optimizer)
    models.train(model, optimizer, INPUTS, INTERVAL)
    assert moved(before, effective_weights(optimizer)) == {"second"}
    for factor in factors:
        factor.requires_grad_(True)
    trains_on(model, optimizer)


class Experts(nn.Module):
    """Two layers, of which a batch takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(12, 8)
        self.chosen = "first"

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.chosen)(x)


@kinds
def test_expert_that_no_token_reaches_stands_still(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = models.with_lora(Experts(), target_modules=["first", "second"])
    options = {"rule": "auto", **options}
    optimizer = training.optimizer_of(model, adamw={"weight_decay": 0}, **options)
    for step in range(4 * INTERVAL):
        chosen = model.get_base_model().chosen = ("first", "second")[step // 2 % 2]
        before = effective_weights(optimizer)
        models.train(model, optimizer, INPUTS, 1)
        assert moved(before, effective_weights(optimizer)) == {chosen}
    assert optimizer.rebase_count > 0


@kinds
def test_step_without_any_gradient_warns_and_changes_nothing(options: dict[str, Any]) -> None:
    _, optimizer = make(options)
    before = effective_weights(optimizer)
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        optimizer.step()
    assert moved(before, effective_weights(optimizer)) == set()


# Adapters


@kinds
def test_adapter_added_in_the_middle_changes_nothing(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    before = models.answers(model, INPUTS)
    model.add_adapter("late", copy.deepcopy(model.peft_config["default"]))
    assert torch.equal(models.answers(model, INPUTS), before)
    trains_on(model, optimizer)


@kinds
def test_adapter_switched_off_for_a_while_keeps_what_it_is(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    before = effective_weights(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the folded base: test_misleading_names
        model.set_adapter("other")
    backward(model)
    with pytest.warns(UserWarning, match="another adapter activated"):
        optimizer.step()
    assert moved(before, effective_weights(optimizer)) == set()
    model.set_adapter("default")
    trains_on(model, optimizer)


def deleted(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")


def deleted_and_added(model: Any) -> None:
    config = copy.deepcopy(model.peft_config["default"])
    deleted(model)
    model.add_adapter("default", config)


def replaced(model: Any) -> None:
    """As ``torch.__future__.set_overwrite_module_params_on_conversion`` lets ``.to`` do."""
    for lora in (models.layer(model, name) for name in ("first", "second")):
        factor = lora.lora_A["default"]
        factor.weight = nn.Parameter(factor.weight.detach().clone())


def parametrized(model: Any) -> None:
    """The weight is computed from a parameter of another name."""
    factor = models.layer(model, "first").lora_A["default"]
    torch.nn.utils.parametrize.register_parametrization(factor, "weight", nn.Tanh())


@kinds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deleted, "has no adapter 'default' any more"),
        (deleted_and_added, "are no longer parameters that this optimizer steps"),
        (replaced, "are no longer parameters that this optimizer steps"),
        (parametrized, "are no longer parameters that this optimizer steps"),
    ],
)
def test_layers_that_are_not_the_optimizers_any_more_are_refused(
    change: Callable[[Any], None], message: str, options: dict[str, Any]
) -> None:
    model, optimizer = make(options)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    change(model)
    before = models.bits(model)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    models.assert_same_bits(model, before)


def test_a_deleted_adapter_leaves_nothing_to_save_or_load_into() -> None:
    model, optimizer = make({})
    state = copy.deepcopy(optimizer.state_dict())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    deleted(model)
    before = copy.deepcopy(optimizer.inner.state_dict()["state"])
    saves = [optimizer.state_dict, optimizer.rebasing_state]
    for call in [*saves, lambda: optimizer.load_state_dict(state)]:
        with pytest.raises(ValueError, match="has no adapter 'default' any more"):
            call()
    after = optimizer.inner.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Optimizers


@kinds
def test_second_optimizer_takes_over_and_the_first_is_refused(options: dict[str, Any]) -> None:
    model, first = make(options)
    second = training.optimizer_of(model, **{"rule": "auto", **options})
    backward(model)
    before = models.bits(model)
    with pytest.raises(ValueError, match="another ScaLoRA, made later, re-bases 'first' too"):
        first.step()
    models.assert_same_bits(model, before)
    trains_on(model, second)


def test_optimizers_of_two_parts_go_side_by_side() -> None:
    torch.manual_seed(0)
    model = models.with_lora(models.Perceptron(), target_modules=["first", "second"])
    by_layer = []
    for name in ("first", "second"):
        lora = models.layer(model, name)
        inner = torch.optim.AdamW(models.factor_parameters(lora), lr=1e-2)
        with pytest.warns(UserWarning, match="1 LoRA layers stay plain LoRA"):
            by_layer.append(scalora.ScaLoRA(inner, model, rule="exact"))
    for _ in range(4):
        backward(model)
        for optimizer in by_layer:
            optimizer.step()
            optimizer.zero_grad()
    assert [optimizer.rebase_count for optimizer in by_layer] == [4, 4]


def test_optimizer_of_a_model_made_anew_is_refused_or_says_so() -> None:
    old, optimizer = make(KINDS["exact"])
    new, _ = make(KINDS["exact"], steps=0)
    with pytest.raises(ValueError, match="its parameters are not in the optimizer"):
        scalora.ScaLoRA(torch.optim.AdamW(models.trainable(old), lr=1e-2), new)
    backward(new)
    with pytest.warns(UserWarning, match="Was the model made anew after its optimizer"):
        optimizer.step()


# Conversion


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_conversion_before_the_first_step_is_as_if_it_had_begun_so(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, optimizer = make(options, steps=0)
    trains_on(model.to(dtype), optimizer)


@kinds
def test_half_in_the_middle_is_refused_until_the_state_is_brought_along(
    options: dict[str, Any],
) -> None:
    model, optimizer = make(options)
    model.half()
    backward(model)
    before = models.bits(model)
    with pytest.raises(ValueError, match=r"load_state_dict\(optimizer.state_dict\(\)\)"):
        optimizer.step()
    models.assert_same_bits(model, before)
    optimizer.load_state_dict(optimizer.state_dict())
    trains_on(model, optimizer)


@kinds
def test_move_that_makes_other_parameters_is_refused(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    model.to("meta")
    for p in models.trainable(model):
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="are no longer parameters that this optimizer steps"):
        optimizer.step()


@pytest.mark.gpu
@kinds
def test_gpu_training_goes_on_once_the_state_was_brought_along(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    model.to("cuda")
    with pytest.raises(
        ValueError, match=r"cuda:\d now, its optimizer's state torch.float32 on cpu"
    ):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        optimizer.zero_grad()
        model(INPUTS.cuda()).square().mean().backward()
        optimizer.step()
    assert all(weight.isfinite().all() for weight in effective_weights(optimizer).values())
    assert {pair.P_parameter.device.type for pair in lora_pairs(model, "default")} == {"cuda"}


# Copies


@kinds
def test_optimizer_copied_alone_trains_a_model_of_its_own(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    before = models.bits(model)
    twin = copy.deepcopy(optimizer)
    trains_on(twin.model, twin)
    models.assert_same_bits(model, before)
    trains_on(model, optimizer)


@kinds
def test_model_copied_alone_is_trained_by_a_new_optimizer(options: dict[str, Any]) -> None:
    model, optimizer = make(options)
    twin = copy.deepcopy(model)
    trains_on(twin, training.optimizer_of(twin, **{"rule": "auto", **options}))
    trains_on(model, optimizer)
