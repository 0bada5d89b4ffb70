"""Models whose adapters contribute, and monitors that measure them once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import bert, outputs, trainable, with_lora
from torch import Tensor, nn

from miub import MIUBMonitor, MIUBReport
from miub.estimators import Estimate


def wake(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give every adapter a contribution: a fresh one has none."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.1 * noise)
    return model


def encoder(**lora) -> nn.Module:
    """Return a tiny BERT with woken adapters, in evaluation mode."""
    model = wake(with_lora(bert(), **{"target_modules": ["query", "dense"], **lora}))
    return model.eval()


def measured(model: nn.Module, *inputs: Tensor, **options) -> MIUBReport:
    """Return the report on one forward pass per input."""
    monitor = MIUBMonitor(model, every=1, **{"tokens": 64, **options})
    with monitor, torch.no_grad():
        for batch in inputs:
            outputs(model, batch)
    return monitor.report()


def collector() -> tuple[list[tuple[Tensor, Tensor]], Callable[..., Estimate]]:
    """Return an estimator that keeps its samples, and the list where it keeps them."""
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(u: Tensor, v: Tensor, *, noise: float) -> Estimate:
        kept.append((u.clone(), v.clone()))
        return Estimate(u.new_zeros(()), u.new_zeros(()), len(u))

    return kept, keep
