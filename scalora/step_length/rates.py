"""Learning rates of parameter groups, read without waiting for a device.

Held by tests/step_length/test_learning_rates.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def host_rate(lr: float | Tensor) -> float | Tensor:
    """Return a learning rate as a number, or as a tensor if it is on a device: nobody waits."""
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def highest_rate(
    groups: Sequence[dict[str, Any]], parameters: Sequence[nn.Parameter]
) -> float | None:
    """Return the highest learning rate of some parameters; None where one is kept on a device.

    Args:
        groups: an optimizer's, others among them: a new head's rate says nothing of an adapter's.
        parameters: whose rates are asked for.
    """
    wanted = {id(p) for p in parameters}
    of_these = [group for group in groups if any(id(p) in wanted for p in group["params"])]
    rates = [host_rate(group["lr"]) for group in of_these]
    known = [rate for rate in rates if not isinstance(rate, Tensor)]
    return max(known) if known and len(known) == len(rates) else None


def is_zero(lr: float | Tensor) -> bool:
    """Return whether a learning rate is 0, as far as that is known without waiting."""
    rate = host_rate(lr)
    return not isinstance(rate, Tensor) and rate == 0
