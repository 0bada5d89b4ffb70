"""Inner optimizers and ways to wrap them, and the kinds of step that each takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

import scalora

# The second step calibrates, the fifth does nothing but step, and the sixth re-bases for the second
# time: all that is made only once has been made by then.
_INTERVAL = _CALIBRATION = 3
KINDS = {"ordinary": 5, "calibrating": 2, "re-basing": 6}
"""Kind of step -> the number of the one that is measured."""

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Case:
    """An inner optimizer and how it is wrapped.

    Attributes:
        inner: a name in `INNER`.
        rule, accumulator, rounding: `scalora.ScaLoRA`'s; without a rule the inner steps alone.
    """

    inner: str = "AdamW foreach"
    rule: str | None = None
    accumulator: str = ""
    rounding: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `scalora.ScaLoRA`."""
        chosen: dict[str, Any] = {
            "rule": self.rule,
            "accumulator": self.accumulator,
            "rounding": self.rounding,
        }
        if self.rule != "none":
            chosen["interval"] = _INTERVAL
        if self.rule == "auto":
            chosen["calibration"] = _CALIBRATION
        return {name: value for name, value in chosen.items() if value}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of step that it takes."""
        if self.rule in (None, "none"):
            return ("ordinary",)
        return tuple(KINDS) if self.rule == "auto" else ("ordinary", "re-basing")


def _adamw_8bit(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-3)


INNER: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "AdamW 8-bit": _adamw_8bit,
}
# These wait for the device themselves: after every parameter.
_OWN_WAITS = {"AdamW 8-bit": "bitsandbytes.optim.optimizer.sync_gpu"}


def measured_steps(
    measure: Callable[[Callable[[], object]], Measured], model: nn.Module, case: Case
) -> dict[str, Measured]:
    """Return what ``measure`` finds of one step of each kind.

    Args:
        measure: calls what it is given, once.  The first step, which allocates, is not given to it.
        model: with an adapter; gradients are zeros.
        case: what steps it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = INNER[case.inner](parameters)
    if case.rule is not None:
        optimizer = scalora.ScaLoRA(optimizer, model, **case.options)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    own = _OWN_WAITS.get(case.inner)
    with warnings.catch_warnings(), mock.patch(own) if own else nullcontext():
        warnings.filterwarnings("ignore", message="save_pretrained writes the adapter alone")
        optimizer.step()
        found = {step: measure(optimizer.step) for step in range(2, max(KINDS.values()) + 1)}
    return {kind: found[KINDS[kind]] for kind in case.kinds}
