"""A step that trains nothing: one that is taken so that an optimizer has its state.

torch.distributed.checkpoint takes one before it saves or loads the state of an optimizer that has
none, with gradients of zeros and a learning rate of 0.
"""

from __future__ import annotations

import torch

from scalora import sharding
from scalora.step_length.rates import is_zero


@torch.no_grad()
def only_makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a coming step is such a one; alike on every process that parameters are sharded over.

    Every group counts: a step that trains a new head alone, before the adapter's warm-up, is a
    step.

    Args:
        optimizer: with the gradients of the step.  Where it has no state and all rates are 0 they
            are looked at, and the device is waited for: once at most, but for one that never has
            any.
    """
    if optimizer.state or not all(is_zero(group["lr"]) for group in optimizer.param_groups):
        return False
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    if not grads or any(grad.is_sparse for grad in grads):
        return False
    first = sharding.local(grads[0])
    moving = torch.stack([sharding.local(grad).any().to(first.device) for grad in grads])
    still = moving.any().logical_not()
    for spread in sharding.layouts(grads):
        still = sharding.everywhere(still, spread)
    return bool(still)
