"""A re-basing that cannot be finished leaves every layer whole."""

from __future__ import annotations

import copy

import internals
import models
import pytest
import torch
from failing import FailAt
from torch import nn
from two_layers import adamw, backward, copy_with_gradients, effective, make_model, rebasing, train

import scalora
from scalora.peft_layers import lora_pairs
from scalora.rebasing.accumulators import dense


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
