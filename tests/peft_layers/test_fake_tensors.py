"""Models of fake tensors, by which people plan a run's memory or count what it launches."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode

import scalora
from scalora.peft_layers import lora_pairs, storage_address, why_no_carry, why_not_dense


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    # PEFT moves new factors to where they are already, which torch cannot do with fake ones.
    unmoved = mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self)
    with FakeTensorMode(), unmoved:
        yield


def make_model() -> nn.Module:
    base = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    base[2].weight = base[1].weight
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2"]))


def test_layers_are_rebased_wherever_real_ones_are() -> None:
    model = make_model()
    for pair in lora_pairs(model, "default"):
        assert why_not_dense(pair) is None
        assert why_no_carry(pair) is None
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = scalora.ScaLoRA(inner, model)
    assert list(optimizer.places.values()) == ["dense", "carry", "carry"]  # two are tied


def test_storage_is_told_apart() -> None:
    one, other = torch.empty(3), torch.empty(3)
    assert storage_address(one) == storage_address(one.view(3, 1)) != storage_address(other)
