"""Full fine-tuning of every weight, and of the weights that LoRA adapts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from peft import LoraConfig
from torch import nn

from scalora import peft_layers
from scalora.ablation.methods.adapter import on_adapted_layers, put_adapter
from scalora.ablation.methods.method import Recipe, Setup, Training
from scalora.ablation.methods.schedule import adamw, linear_schedule
from scalora.ablation.task import Task


@dataclass(frozen=True)
class AdaptedLayers:
    """The parts of a model that LoRA trains, by the model's own names."""

    shapes: dict[str, tuple[int, int]]
    """Layer name -> (m, n) of the weight that gets an adapter."""
    head: frozenset[str]
    """Names of the parameters that are trained in full beside the adapters."""


def adapted_layers(model: nn.Module, task: Task) -> AdaptedLayers:
    """Return what LoRA would train of a pretrained model, found by asking PEFT on a copy."""
    config = LoraConfig(r=1, **on_adapted_layers(task))
    wrapped = put_adapter(copy.deepcopy(model), config, seed=0)
    shapes = {
        pair.name: (pair.P_parameter.shape[0], pair.Q_parameter[0].numel())
        for pair in peft_layers.lora_pairs(wrapped, "default")
    }
    names = [name for name, _ in model.named_parameters()]
    head = frozenset(name for name in names if peft_layers.is_saved_with_adapter(wrapped, name))
    return AdaptedLayers(shapes, head)


@dataclass(frozen=True)
class Full(Recipe):
    """Full fine-tuning with AdamW: every parameter of the model."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning"
    rate: ClassVar[float] = 0.1

    def trains(self, setup: Setup) -> set[str]:
        """Return the names of the parameters that are trained."""
        return {name for name, _ in setup.model.named_parameters()}

    def training(self, setup: Setup) -> Training:
        """Make the model ready, in place, and return what trains it."""
        trained = self.trains(setup)
        for name, parameter in setup.model.named_parameters():
            parameter.requires_grad_(name in trained)
        optimizer = adamw(setup.model, setup)
        return Training(setup.model, optimizer, linear_schedule(optimizer, setup))


@dataclass(frozen=True)
class FullAdapted(Full):
    """Full fine-tuning of the weights that LoRA adapts, and of the head that it trains in full.

    It is the upper end of LoRA: an adapter of full rank could reach as much.
    """

    name: ClassVar[str] = "full-adapted"
    title: ClassVar[str] = "full fine-tuning, LoRA's layers"

    def trains(self, setup: Setup) -> set[str]:
        """Return the names of the parameters that are trained."""
        adapted = adapted_layers(setup.model, setup.task)
        return {f"{layer}.weight" for layer in adapted.shapes} | adapted.head
