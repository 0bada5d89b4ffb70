"""A warning points at the line of the user's script that it is about, whatever lies between."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments

import scalora
from miub import MIUBMonitor

INPUTS = models.vectors(16, 12)


def perceptron() -> Any:
    torch.manual_seed(0)
    return models.with_lora(models.Perceptron(), target_modules=["first", "second"])


def adamw(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.AdamW(models.trainable(model), lr=lr)


def with_a_frozen_layer() -> Any:
    model = perceptron()
    for factor in models.factor_parameters(models.layer(model, "first")):
        factor.requires_grad_(False)
    return model


def full_carry() -> tuple[Any, scalora.ScaLoRA]:
    model = perceptron()
    options: dict[str, Any] = {"rule": "exact", "accumulator": "carry", "carry_rank": 6}
    return model, scalora.ScaLoRA(adamw(model), model, carry_tolerance=1e-12, **options)


def cut_in_a_loop(folder: Path) -> None:
    model, optimizer = full_carry()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        models.loss(model, INPUTS).backward()
        optimizer.step()  # here
        schedule.step()


def cut_under_accelerate(folder: Path) -> None:
    model, optimizer = full_carry()
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    for _ in range(8):
        prepared.zero_grad()
        accelerator.backward(models.loss(model, INPUTS))
        prepared.step()  # here


def frozen_layer(folder: Path) -> None:
    model = with_a_frozen_layer()
    scalora.ScaLoRA(torch.optim.AdamW(models.trainable(model)), model)  # here


def frozen_layer_in_the_factory(folder: Path) -> None:
    model = with_a_frozen_layer()
    scalora.create_scalora_optimizer(model, torch.optim.AdamW, lr=0.1)  # here


class Answering(nn.Module):
    """As a Trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = with_a_frozen_layer()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": models.loss(self.model, inputs)}


def frozen_layer_under_a_trainer(folder: Path) -> None:
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True
    )
    data: Any = [{"inputs": row} for row in INPUTS]
    trainer = Trainer(Answering(), args, train_dataset=data, callbacks=[scalora.ScaLoRACallback()])
    trainer.train()  # here


def adapter_alone(folder: Path) -> None:
    model = perceptron()
    optimizer = scalora.ScaLoRA(adamw(model), model, rule="exact", accumulator="carry")
    models.train(model, optimizer, INPUTS, 2)
    model.save_pretrained(folder)  # here


def another_optimizers_state(folder: Path) -> None:
    model = perceptron()
    inner = adamw(model)
    models.train(model, inner, INPUTS, 1)
    scalora.ScaLoRA(adamw(model), model).load_state_dict(inner.state_dict())  # here


def no_gradient(folder: Path) -> None:
    model = perceptron()
    scalora.ScaLoRA(adamw(model), model).step()  # here


def nan(folder: Path) -> None:
    model = perceptron()
    optimizer = scalora.ScaLoRA(adamw(model), model)
    models.loss(model, INPUTS * torch.nan).backward()
    optimizer.step(None)  # here


def few_tokens(folder: Path) -> None:
    model = models.with_lora(nn.Sequential(nn.Linear(12, 8)), target_modules=["0"])
    with MIUBMonitor(model, every=1, tokens=32):
        model(INPUTS[:4])  # here


def layer_not_measured(folder: Path) -> None:
    model = models.with_lora(models.Attention(), target_modules=["attention", "head"])
    MIUBMonitor(model)  # here


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut in a loop": (cut_in_a_loop, "the carry of"),
    "cut under accelerate": (cut_under_accelerate, "the carry of"),
    "frozen layer": (frozen_layer, "stay plain LoRA"),
    "frozen layer, factory": (frozen_layer_in_the_factory, "stay plain LoRA"),
    "frozen layer, Trainer": (frozen_layer_under_a_trainer, "stay plain LoRA"),
    "adapter alone": (adapter_alone, "writes the adapter alone"),
    "another optimizer's state": (another_optimizers_state, "holds nothing of re-basing"),
    "no gradient": (no_gradient, "no parameter of this optimizer has a gradient"),
    "NaN": (nan, "not finite"),
    "few tokens": (few_tokens, "tokens in a forward pass"),
    "layer not measured": (layer_not_measured, "are not measured"),
}


@pytest.mark.parametrize("give, message", CASES.values(), ids=CASES.keys())
def test_warning_points_at_the_users_line(
    give: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        give(tmp_path)
    found = [w for w in caught if message in str(w.message)]
    assert found
    for warning in found:
        assert warning.filename == __file__
        assert linecache.getline(__file__, warning.lineno).rstrip().endswith("# here")
