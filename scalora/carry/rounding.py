"""A carry in fewer bits than the adapter: what rounding cuts stays in the adapter.

Held by tests/carry/test_carry_rounding.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scalora.carry.factors import inner_product
from scalora.sharding.rows import HERE, Rows


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in its own dtype whose values are all values of ``dtype``, the nearest.

    What is beyond the largest of those becomes that one.
    """
    largest = torch.finfo(dtype).max
    return tensor.clamp(-largest, largest).to(dtype).to(tensor.dtype)


class Frozen(NamedTuple):
    """A share of P that a narrow dtype holds exactly, and what goes on without it.

    Attributes:
        up: (..., m, r), values of the narrow dtype.
        P: (..., m, r), what stays.
        ratio: (..., r), for `absorbed`.
    """

    up: Tensor
    P: Tensor
    ratio: Tensor


def frozen(P: Tensor, increment: Tensor, dtype: torch.dtype, rows: Rows = HERE) -> Frozen:
    """Round a share of P that is to be frozen, and leave in P what rounding cuts.

    With ``increment = t P`` column by column, ``up = increment - a`` and ``down = Q - b`` rounded,

        P~ = P - up = (1 - t) P + a ,      Q~ = Q + t / (1 - t) b     (`absorbed`)

    keep ``P~ Q~ + up down = P Q`` but for ``a b / (1 - t)``, the product of two roundings: in
    float16 that is less than float32's own rounding of ``P Q`` (docs/mathematics.md, "Where the
    increment goes").

    Args:
        P: (..., m, r), the rows held here.
        increment: (..., m, r), of every column of P a share t below 1.
        dtype: the narrow one.
        rows: who holds the m rows.
    """
    up, rest = rounded(increment, dtype), P - increment
    shares = rows.sum(torch.stack([(increment * rest).sum(-2), rest.square().sum(-2)]))
    return Frozen(up, P - up, torch.where(shares[1] > 0, shares[0] / shares[1], 0))


def absorbed(Q: Tensor, ratio: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Q with what rounding it for the carry cut, times ``ratio``: (..., r, n).

    Args:
        Q: (..., r, n).
        ratio: (..., r), t / (1 - t) as `frozen` returned it.
        dtype: the narrow one.
    """
    return torch.addcmul(Q, ratio.unsqueeze(-1), Q - rounded(Q, dtype))


def rounding_energy(up: Tensor, down: Tensor, dtype: torch.dtype, rows: Rows = HERE) -> Tensor:
    """Return the energy of what rounding both factors changes in their product: (...,).

    Args:
        up, down: (..., m, c) and (..., c, n).
        dtype: the narrow one.
        rows: who holds the m rows and the n columns, as for `scalora.carry.compress`.
    """
    narrow_up, narrow_down = rounded(up, dtype), rounded(down, dtype)
    change_up = torch.cat([up - narrow_up, narrow_up], dim=-1)
    change_down = torch.cat([down, down - narrow_down], dim=-2)
    return inner_product(change_up, change_down, change_up, change_down, rows)
