"""ScaLoRA around AdamW over what a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import models
import torch
from torch import Tensor, nn

import scalora


def optimizer_of(
    model: nn.Module,
    *,
    lr: float | Tensor = 1e-2,
    adamw: Mapping[str, Any] | None = None,
    **options: Any,
) -> scalora.ScaLoRA:
    """Return a new optimizer, by whose rule every layer is re-based at every step unless told.

    Args:
        model: has the adapter that is trained.
        lr: AdamW's learning rate.
        adamw: other arguments of AdamW.
        options: arguments of ScaLoRA; ``rule="exact"`` where they say nothing of it.
    """
    inner = torch.optim.AdamW(models.trainable(model), lr=lr, **(adamw or {}))
    return scalora.ScaLoRA(inner, model, **{"rule": "exact", **options})


def rebase(
    model: nn.Module,
    inputs: Tensor,
    steps: int,
    *,
    loss: Callable[[nn.Module, Tensor], Tensor] = models.loss,
    **options: Any,
) -> scalora.ScaLoRA:
    """Train a model for some steps on the same inputs, and return its optimizer."""
    optimizer = optimizer_of(model, **options)
    models.train(model, optimizer, inputs, steps, loss)
    return optimizer


def effective_weights(optimizer: scalora.ScaLoRA) -> dict[str, Tensor]:
    """Return what every re-based layer multiplies with, base, carry and adapter, by its name."""
    return {pair.name: pair.effective_weight() for pair in optimizer.rebased_pairs}
