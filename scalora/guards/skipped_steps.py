"""Steps that are left out: dummy steps, and steps whose gradients are not finite or missing.

Held by tests/guards/test_situations.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from scalora import sharding
from scalora.step_length.rates import is_zero
from scalora.warning import warn

_FEW = 1 << 22  # elements; up to so few, copying all into a row is faster than asking one by one


class DummyStep:
    """Lets an optimizer make its state in a dummy step, and drops that state before a real one.

    torch.distributed.checkpoint takes such a step before it saves or loads an optimizer that has no
    state yet, with gradients of zeros and a learning rate of 0.  The state would count it as a step
    of training.
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


def warn_without_gradients(param_groups: Iterable[dict[str, Any]]) -> None:
    """Warn if no parameter has a gradient, which is what an optimizer of another model finds."""
    if all(p.grad is None for group in param_groups for p in group["params"]):
        warn(
            "no parameter of this optimizer has a gradient, so the step does nothing. Was the "
            "model made anew after its optimizer, or another adapter activated? Make the optimizer "
            "over the parameters that are trained."
        )


@torch.no_grad()
def not_finite(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return whether any gradient is not finite; of sharded ones, on any process.

    Returns:
        () bool, on an accelerator if any gradient is on one; None without gradients, and where
        nothing could follow from it: on an accelerator with an optimizer that cannot skip.
    """
    grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    groups = optimizer.param_groups
    found = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    if not can_skip(optimizer) and any(grad.device.type != "cpu" for grad in found):
        return None
    spread = sharding.layouts(found)
    for grad in map(sharding.local, found) if spread else found:
        if not grad.is_sparse and grad.numel():  # a small parameter has no rows on some processes
            grads.setdefault((grad.device, grad.dtype), []).append(grad)
    norms = map(_magnitudes, grads.values())
    flags = [(norm - norm).any() for norm in norms]  # inf - inf and nan - nan are no zeros
    if spread and not flags:
        flags = [torch.zeros((), dtype=torch.bool, device=spread[0].device)]
    if not flags:
        return None
    # On an accelerator if there is one: a copy from there to the host would have to be waited for.
    device = next((f.device for f in flags if f.device.type != "cpu"), flags[0].device)
    overflow = flags[0]
    if len(flags) > 1:
        overflow = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()
    for tensor in spread:
        overflow = sharding.everywhere(overflow.logical_not(), tensor).logical_not()
    return overflow


def _magnitudes(grads: list[Tensor]) -> Tensor:
    """Return the largest magnitude in tensors of one device and dtype: of each, or () of all."""
    if grads[0].device.type == "cpu" and sum(map(Tensor.numel, grads)) <= _FEW:
        return torch.linalg.vector_norm(_flatten_dense_tensors(grads), torch.inf)
    return torch.stack(torch._foreach_norm(grads, torch.inf))


def can_skip(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer skips a step by itself if a tensor on its device says so."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_unless(overflow: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step an optimizer that `can_skip`, unless ``overflow``, () bool, is true on its device."""
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, overflow.to(torch.float32)
    try:
        fused.step()
    finally:
        del fused.grad_scale, fused.found_inf
