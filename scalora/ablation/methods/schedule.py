"""The optimizer and the learning-rate schedule that methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from scalora.ablation.methods.method import Setup


def linear_factor(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate in the step after ``step`` others.

    It rises linearly from 0 at the first step to 1 after ``warmup`` steps and falls linearly to 0
    after ``steps``, the default of ``transformers.Trainer``.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def linear_schedule(
    optimizer: torch.optim.Optimizer,
    setup: Setup,
    also: Callable[[int], float] | None = None,
) -> LambdaLR:
    """Warm up and decay the learning rate of every parameter group, each from its own.

    Args:
        optimizer: at its highest learning rate.
        setup: the run's.
        also: step -> another factor.
    """

    def factor(step: int) -> float:
        own = linear_factor(step, setup.steps, setup.warmup)
        return own if also is None else own * also(step)

    return LambdaLR(optimizer, factor)


def decayed_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: weight decay is for matrices, not for biases and norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, setup: Setup) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, with the task's weight decay."""
    groups = decayed_groups(model, setup.task.weight_decay)
    return torch.optim.AdamW(groups, lr=setup.learning_rate)
