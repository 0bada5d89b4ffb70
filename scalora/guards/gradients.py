"""Steps whose gradients are missing or not finite, skipped without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scalora import sharding
from scalora.warning import warn


def warn_without_gradients(param_groups: Iterable[dict[str, Any]]) -> None:
    """Warn if no parameter has a gradient, which is what an optimizer of another model finds."""
    if all(p.grad is None for group in param_groups for p in group["params"]):
        warn(
            "no parameter of this optimizer has a gradient, so the step does nothing. Was the "
            "model made anew after its optimizer, or another adapter activated? Make the optimizer "
            "over the parameters that are trained."
        )


@torch.no_grad()
def not_finite(param_groups: Iterable[dict[str, Any]]) -> Tensor | None:
    """Return whether any gradient is not finite; of sharded ones, on any process.

    Returns:
        () bool, on an accelerator if any gradient is on one; None without gradients.
    """
    grads: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    found = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    for grad in map(sharding.local, found):
        if not grad.is_sparse and grad.numel():  # a small parameter has no rows on some processes
            grads.setdefault((grad.device, grad.dtype), []).append(grad)
    flags = [
        torch.stack(torch._foreach_norm(same, torch.inf)).isfinite().logical_not().any()
        for same in grads.values()
    ]
    spread = sharding.layouts(found)
    if spread and not flags:
        flags = [torch.zeros((), dtype=torch.bool, device=spread[0].device)]
    if not flags:
        return None
    # On an accelerator if there is one: a copy from there to the host would have to be waited for.
    device = next((f.device for f in flags if f.device.type != "cpu"), flags[0].device)
    overflow = torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()
    for tensor in spread:
        overflow = sharding.everywhere(overflow.logical_not(), tensor).logical_not()
    return overflow


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
