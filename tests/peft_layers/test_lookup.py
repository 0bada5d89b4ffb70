"""What is found of layers once is looked up again wherever a module holds something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import nn

from scalora.peft_layers import LayerLookup, lora_pairs


def _linear() -> Any:
    return models.with_lora(models.Perceptron(), target_modules=["first", "second"])


def _embedding() -> Any:
    return models.with_lora(models.Embedder(), target_modules=["tokens"])


@pytest.mark.parametrize("make", [_linear, _embedding])
def test_layers_are_found_as_their_pairs_find_them_and_once(make: Callable[[], Any]) -> None:
    pairs = lora_pairs(make(), "default")
    lookup = LayerLookup(pairs)
    assert not lookup.has_same_factors
    found = lookup.found()
    assert lookup.found() is found and lookup.has_same_factors
    for pair, layer in zip(pairs, found, strict=True):
        assert (pair.P_parameter, pair.Q_parameter) == (layer.P, layer.Q)
        assert layer.base is pair.base_weight and layer.scaling == pair.scaling
        assert not layer.merged


def _other_P(model: Any) -> None:
    factor = models.layer(model, "second").lora_B["default"]
    factor.weight = nn.Parameter(factor.weight.detach().clone())


def _other_module(model: Any) -> None:
    factors = models.layer(model, "first").lora_A
    factors["default"] = copy.deepcopy(factors["default"])


def _other_dictionary(model: Any) -> None:
    layer = models.layer(model, "first")
    layer.lora_A = nn.ModuleDict(dict(layer.lora_A.items()))


def _other_owner(model: Any) -> None:
    lora_pairs(model, "default")[1].claim(object())


FACTORS = [_other_P, _other_module, _other_dictionary, _other_owner]


def _other_base(model: Any) -> None:
    base = models.layer(model, "first").get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().clone())


def _other_layer(model: Any) -> None:
    layer = models.layer(model, "first")
    layer.base_layer = copy.deepcopy(layer.base_layer)


def _other_scaling(model: Any) -> None:
    models.layer(model, "second").scaling["default"] *= 2


@pytest.mark.parametrize("change", [*FACTORS, _other_base, _other_layer, _other_scaling])
def test_whatever_a_module_holds_instead_is_found(change: Callable[[Any], None]) -> None:
    model = _linear()
    pairs = lora_pairs(model, "default")
    lookup = LayerLookup(pairs)
    before = lookup.found()
    change(model)
    assert lookup.has_same_factors == (change not in FACTORS)
    after = lookup.found()
    assert after is not before
    for pair, layer in zip(pairs, after, strict=True):
        assert layer.P is pair.P_parameter and layer.Q is pair.Q_parameter
        assert layer.base is pair.base_weight and layer.scaling == pair.scaling


def test_merged_adapter_shows_in_what_was_found_before() -> None:
    model = _linear()
    [first, _] = LayerLookup(lora_pairs(model, "default")).found()
    models.layer(model, "first").merge()
    assert first.merged and first.pair.is_merged


def test_copy_finds_the_tensors_of_its_own_model() -> None:
    model = _linear()
    lookup = LayerLookup(lora_pairs(model, "default"))
    found = lookup.found()
    _, other = copy.deepcopy((model, lookup))
    assert not other.has_same_factors
    for own, others in zip(found, other.found(), strict=True):
        assert own.P is not others.P and torch.equal(own.P, others.P)
