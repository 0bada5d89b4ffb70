"""A method: how a pretrained model is made ready and what trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from scalora.ablation.task import Task


@dataclass(frozen=True)
class Setup:
    """What a method is given; nothing in it says which method it is."""

    task: Task
    model: nn.Module
    """The pretrained model, this run's own copy, on the device where it trains."""
    rank: int
    learning_rate: float
    steps: int
    warmup: int
    """Steps over which the learning rate rises to what was asked for."""
    seed: int


@dataclass
class Training:
    """What a run trains with."""

    model: nn.Module
    """What computes the loss: the model itself, or a ``PeftModel`` around it."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    after_step: Callable[[int], None] | None = None
    """Called with the number of steps done, after the optimizer and the schedule."""


@dataclass(frozen=True)
class Method:
    """A named way to train.

    rate: what the task's learning rates are multiplied with. Full fine-tuning works at smaller
    ones; every method gets equally many.
    """

    name: str
    start: Callable[[Setup], Training]
    rate: float = 1.0
