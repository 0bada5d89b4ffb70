"""Tensors of many layers stacked into one, so that one call serves all of them.

Held by tests/peft_layers/test_layers.py and tests/sharding/test_sharded_training.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalora.sharding.rows import local

Write = tuple[Sequence[Tensor], Tensor, Tensor]
"""Tensors to write to, and their stacks (layers, ...) before and after the write."""


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return detached tensors stacked as (layers, ...); of sharded ones, this process's rows."""
    return torch.stack([local(tensor) for tensor in tensors]).detach()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device, without waiting for the device."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
    return pinned.to(device, non_blocking=True)


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients of parameters that have one; of sharded ones, this process's rows."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
