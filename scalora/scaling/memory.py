"""Column scalings of P alone that let an adapter remember its last K steps.

With ``P~ = P diag(alpha)``, ``alpha`` at most 1, and Q as it is, what an adapter has learned moves
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


def longest(step: Tensor, memory: float) -> Tensor:
    """Return how long a column of P may be that ``memory`` steps are to have made: (..., 1).

    Infinite where a layer does not move.

    Args:
        step: (...,), how far one step at the highest learning rate moves a column of P.
        memory: K, in steps.
    """
    return torch.where(step > 0, memory * step, torch.inf).unsqueeze(-1)


def bounded(lengths: Tensor, most: Tensor) -> Tensor:
    """Return the alpha, in [0, 1], that leaves no column longer than ``most``: (..., r).

    ``alpha_j = min(1, most_j / |p_j|)``: shorter columns stay as they are.  With `longest` this
    bounds a column's age, the number of steps, all in one direction, that it is made of.

    Args:
        lengths: (..., r), ``|p_j|``.
        most: (..., r) or (..., 1).
    """
    return torch.where(lengths > most, most / lengths, torch.ones_like(lengths))


def descent(lengths: Tensor, products: Tensor, squares: Tensor, degree: int) -> Tensor:
    """Return what one batch says of the optimal lengths of P's columns: (..., 2, r).

    In expectation over batches the optimum holds ``|p_j|^(1+d)`` at the mean of the first row over
    the mean of the second, but for a factor that all columns of a layer share (docs/mathematics.md,
    the memory of an adapter).  Neither row depends on the lengths that the columns have.

    Args:
        lengths: (..., r), ``|p_j|``.
        products: (..., r), ``<g_Q,j, u_Q,j>``: this batch's gradient, a direction of earlier ones.
        squares: (..., r), ``|u_Q,j|^2``.
        degree: d, of the direction in the gradient: 0 (Adam) or 1 (SGD).

    Returns:
        Not finite for a column that is still zero.
    """
    powers = lengths ** (1 + degree), lengths ** (2 * degree)
    return torch.stack([products / powers[0], squares / powers[1]], dim=-2)


def shares(descents: Tensor, degree: int) -> Tensor:
    """Return the optimal lengths of P's columns over their mean: (..., r).

    Args:
        descents: (..., 2, r), means of `descent`; zero where nothing is known.  A column that does
            not descend gets 0.  Where none does, all get the same.
        degree: as there.
    """
    products, squares = descents.unbind(-2)
    lengths = (products.clamp_min(0) / squares).nan_to_num(0) ** (1 / (1 + degree))
    mean = lengths.mean(-1, keepdim=True)
    return torch.where(mean > 0, lengths / mean, torch.ones_like(lengths))
