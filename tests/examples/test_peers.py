"""The optimizers that ScaLoRA's cost is compared with train what they say."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from examples.benchmark.peers import PEERS, rebasing

MAKERS = {**PEERS, "the default": rebasing()}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("foreach", [None, True])
def test_every_peer_trains_the_adapter_and_leaves_the_base(name: str, foreach: bool | None) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    optimizer = MAKERS[name](model, foreach)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # the first finds lora_B at zero
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    adapter = {n for n in before if ".lora_B." in n or (".lora_A." in n and "FA" not in name)}
    assert moved == adapter
    assert any(".second." in n for n in moved) == (name == "second adapter")
