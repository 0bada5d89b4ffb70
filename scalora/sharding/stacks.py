"""Tensors of many layers stacked into one, so that one call serves all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalora.sharding.dtensors import local

Write = tuple[Sequence[Tensor], Tensor, Tensor]
"""Tensors to write to, and their stack (layers, ...) before and after."""


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return (layers, ...), outside of autograd; of sharded tensors this process's rows."""
    return torch.stack([local(tensor) for tensor in tensors]).detach()


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradient of each, all of which have one; of sharded ones this process's rows."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
