"""The dummy step that torch.distributed.checkpoint takes so that an optimizer has its state.

It takes one before it saves or loads an optimizer that has no state yet, with gradients of zeros
and a learning rate of 0.
"""

from __future__ import annotations

from typing import Any

import torch

from scalora import sharding
from scalora.step_length.rates import is_zero


class DummyStep:
    """Lets an optimizer make its state in a dummy step, and drops that state before a real one.

    The state counts the dummy step, as if training had begun.
    """

    def __init__(self) -> None:
        self._made: Any = None

    def drop_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the state that the dummy step made, unless another was loaded since."""
        made, self._made = self._made, None
        if made is not None and made is optimizer.state:
            made.clear()

    def take(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take the coming step if it is a dummy; return whether it was."""
        if not is_dummy(optimizer):
            return False
        optimizer.step()
        self._made = optimizer.state
        return True


@torch.no_grad()
def is_dummy(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the coming step trains nothing; alike on all processes of sharded parameters.

    Every group counts: a step that trains a new head alone, before the adapter's warm-up, trains.

    Args:
        optimizer: with the gradients of the step.  Where it has no state and all rates are 0 they
            are looked at, which waits for the device: once, unless the optimizer keeps no state.
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
