"""A run that goes on from what its optimizer saved, or as a copy."""

from __future__ import annotations

import copy
import io
import pickle

import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from two_layers import adamw, make_model, rebasing, train

import scalora


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
