"""A carry belongs to the optimizer's state: saved, resumed, taken over, and refused elsewhere."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import internals
import models
import pytest
import torch
from carry_runs import INPUTS, batches, optimizer_of, pairs, perceptron, train
from peft import PeftModel

import scalora


@pytest.mark.parametrize("options", [{"carry_rank": 8}, {}])
def test_resumed_run_continues_to_the_same_bits(options: dict[str, Any], tmp_path: Any) -> None:
    model = perceptron()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, batches(7))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    expected = train(model, optimizer, batches(12)[7:])

    resumed = perceptron()
    with torch.no_grad():
        for parameter in models.trainable(resumed):
            parameter.normal_()
    other = optimizer_of(resumed, **options)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt"))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert train(resumed, other, batches(12)[7:]) == expected
    assert [r.cut for r in other.report()] == [r.cut for r in optimizer.report()]


@internals.narrow_carries()
def test_resumed_run_with_a_narrow_carry_continues_to_the_same_bits(tmp_path: Any) -> None:
    options: dict[str, Any] = {"carry_rank": 8, "rule": "leak", "memory": 10, "interval": 2}
    inputs = [batch.float() for batch in batches(24)]
    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, inputs[:14])
    torch.save([optimizer.state_dict(), model.state_dict()], tmp_path / "state.pt")
    expected = train(model, optimizer, inputs[14:])

    resumed = perceptron(torch.float32)
    other = optimizer_of(resumed, **options)
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert train(resumed, other, inputs[14:]) == expected
    assert {pair.carry.dtype for pair in pairs(resumed)} == {torch.float16}


def test_carry_that_was_saved_in_float32_stays_what_it_was() -> None:
    """As a run under another rule writes it, and an earlier version under every rule."""
    options: dict[str, Any] = {"carry_rank": 8, "rule": "leak", "memory": 10, "interval": 2}
    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, [batch.float() for batch in batches(14)])
    state = copy.deepcopy(optimizer.state_dict())
    for layer in state["scalora"]["layers"].values():
        for factor in ("up", "down"):
            layer["carry"][factor] = layer["carry"][factor].float() * (1 + 2.0**-20)
    other = optimizer_of(model, **options)
    other.load_state_dict(state)
    for pair in pairs(model):
        saved = state["scalora"]["layers"][pair.name]["carry"]
        assert torch.equal(pair.carry.used_up, saved["up"])
        assert torch.equal(pair.carry.used_down, saved["down"])
    train(model, other, [batch.float() for batch in batches(4)])
    assert {pair.carry.dtype for pair in pairs(model)} == {torch.float32}


def test_checkpoint_holds_the_carry_and_not_the_base(tmp_path: Any) -> None:
    from scalora.files import read_tensors

    model = perceptron(torch.float32)
    optimizer = optimizer_of(model, carry_rank=8)
    inputs = [batch.float() for batch in batches(12)]
    train(model, optimizer, inputs[:7])
    with pytest.warns(UserWarning, match="carry beside the base"):
        model.save_pretrained(tmp_path)
    path = scalora.save_training_state(optimizer, tmp_path)
    tensors, _ = read_tensors(path)
    assert not [name for name in tensors if name.startswith("base:")]
    inner = copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, inputs[7:])

    base = perceptron(torch.float32).unload()
    resumed = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    other = optimizer_of(resumed, carry_rank=8)
    other.load_state_dict({key: value for key, value in inner.items() if key != "scalora"})
    scalora.load_training_state(other, tmp_path)
    assert train(resumed, other, inputs[7:]) == expected


def test_resumed_run_has_the_room_that_a_carry_had_grown_to(tmp_path: Any) -> None:
    options: dict[str, Any] = {"carry_tolerance": 1e-10, "lr": 0.05}
    model = perceptron()
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, batches(26))
    assert max(row.capacity for row in optimizer.report()) > 16
    torch.save([optimizer.state_dict(), model.state_dict()], tmp_path / "state.pt")
    expected = train(model, optimizer, batches(60)[26:])
    resumed = perceptron()
    other = optimizer_of(resumed, **options)
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert train(resumed, other, batches(60)[26:]) == expected


def test_optimizer_that_loads_its_own_state_changes_nothing() -> None:
    model = perceptron()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(7))
    before = models.answers(model, INPUTS)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(models.answers(model, INPUTS), before)
    accelerate.Accelerator(cpu=True).prepare(optimizer)  # does just that
    assert torch.equal(models.answers(model, INPUTS), before)
    assert all(pair.carry.columns for pair in pairs(model))


def test_carry_of_another_adapter_is_refused_at_the_first_step() -> None:
    model = perceptron()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches(5))
    other = perceptron()
    resumed = optimizer_of(other)
    resumed.load_state_dict(optimizer.state_dict())
    models.loss(other, INPUTS).backward()
    with pytest.raises(ValueError, match="adapter of the same checkpoint"):
        resumed.step()
    other.load_state_dict(model.state_dict())
    resumed.step()


def test_second_optimizer_with_more_room_takes_up_the_carry() -> None:
    model = perceptron()
    train(model, optimizer_of(model, carry_rank=4), batches(4))
    before = models.answers(model, INPUTS)
    optimizer = optimizer_of(model, carry_rank=12)
    assert torch.equal(models.answers(model, INPUTS), before)
    train(model, optimizer, batches(2))
    assert {row.capacity for row in optimizer.report()} == {12}


def test_carry_under_a_dense_second_stage_is_saved_and_loaded(tmp_path: Any) -> None:
    model = perceptron(torch.float32)
    inputs = [batch.float() for batch in batches(10)]
    train(model, optimizer_of(model), inputs[:5])
    second = optimizer_of(model, accumulator="dense")
    train(model, second, inputs[5:])
    with pytest.warns(UserWarning, match="save_pretrained"):
        model.save_pretrained(tmp_path)
    scalora.save_training_state(second, tmp_path)
    base = perceptron(torch.float32).unload()
    other = PeftModel.from_pretrained(base, tmp_path)
    scalora.load_rebased_weights(other, tmp_path)
    torch.testing.assert_close(
        models.answers(other, INPUTS.float()), models.answers(model, INPUTS.float())
    )


def test_state_without_a_carry_empties_the_models() -> None:
    model = perceptron()
    optimizer = optimizer_of(model)
    fresh = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(5))
    optimizer.load_state_dict(fresh)
    for pair in pairs(model):
        assert pair.carry.columns == 0
        assert (pair.carry.up == 0).all() and (pair.carry.down == 0).all()


def test_state_of_another_accumulator_is_refused_and_nothing_is_loaded() -> None:
    dense, carried = perceptron(), perceptron()
    one, other = optimizer_of(dense, accumulator="dense"), optimizer_of(carried)
    train(dense, one, batches(3))
    train(carried, other, batches(3))
    before = models.bits(carried)
    with pytest.raises(ValueError, match=r"'first'.*'dense'.*'carry'.*accumulator"):
        other.load_state_dict(one.state_dict())
    models.assert_same_bits(carried, before)
    assert all(pair.carry.columns for pair in pairs(carried))
