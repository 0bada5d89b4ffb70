"""Held-out data do not change a model, and a batch goes to where the model is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def beside(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a batch on the model's device."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
