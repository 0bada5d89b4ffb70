"""Column scalings of P alone that let an adapter remember its last K steps.

With ``P~ = P diag(alpha)``, ``alpha`` in (0, 1], and Q as it is, what an adapter has learned moves
into the frozen weight at the pace at which new things are learned.  A column that is kept small can
turn; one that has grown for long cannot (docs/mathematics.md, the memory of an adapter).

Held by tests/scaling/test_memory.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

Steps = float | Tensor


def leak(memory: float, steps: Steps) -> Steps:
    """Return the alpha, in (0, 1], that forgets ``steps`` steps of a memory of ``memory``.

    ``(1 - 1/K)^steps``: every step loses a share 1/K of P to the weight, whatever the size of P, of
    its gradients and of the learning rate.

    Args:
        memory: K > 1.
        steps: steps since the last re-basing, at the highest learning rate: one at half of it is
            half a step.  A number, or a 0-d tensor.
    """
    return (1 - 1 / memory) ** steps


def bounded_age(lengths: Tensor, step: Tensor, memory: float) -> Tensor:
    """Return the alpha, in (0, 1], that leaves no column of P older than ``memory`` steps.

    A column's age is the number of steps, all in one direction, that it is made of: its length over
    that of one step.  ``alpha_j = min(1, K / age_j)``, (..., r): younger columns stay as they are.

    Args:
        lengths: (..., r), ``|p_j|``.
        step: (...,), how far one step at the highest learning rate moves a column of P.
        memory: K, in steps.
    """
    longest = memory * step.unsqueeze(-1)
    older = (lengths > longest) & (longest > 0)
    return torch.where(older, longest / lengths, torch.ones_like(lengths))
