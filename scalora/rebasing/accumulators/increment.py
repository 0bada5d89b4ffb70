"""What a re-basing takes out of the adapter, as two factors."""

from __future__ import annotations

import torch
from torch import Tensor

from scalora.peft_layers import LoRAPair

_EXACT = (torch.float32, torch.float64)


def increment(
    P: Tensor, P_new: Tensor, Q: Tensor, Q_new: Tensor, alpha_beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``P Q^T - P_new Q_new^T`` as two factors, (layers, m, k) and (layers, n, k).

    In float32 ``P diag(1 - alpha beta) Q^T`` is that to round-off, with k = r.  Half-precision
    factors were rounded when they were scaled: there the difference is taken as it is, k = 2r.

    Args:
        P, P_new: (layers, m, r, ...), as PEFT stores them.
        Q, Q_new: (layers, r, n, ...), likewise.
        alpha_beta: (layers, r), alpha times beta.
    """
    P, P_new = P.flatten(2), P_new.flatten(2)
    Q, Q_new = Q.flatten(2).mT, Q_new.flatten(2).mT
    if P.dtype in _EXACT and Q.dtype == P.dtype:
        share = (1 - alpha_beta).to(P.dtype).unsqueeze(-2)
        zero = torch.zeros_like(share)
        return torch.where(share == 0, zero, P * share), torch.where(share == 0, zero, Q)
    left = torch.cat([P.float(), -P_new.float()], dim=-1)
    right = torch.cat([Q.float(), Q_new.float()], dim=-1)
    changed = (alpha_beta != 1).any(-1)[:, None, None]
    zero = torch.zeros_like(left[:, :1, :1])
    return torch.where(changed, left, zero), torch.where(changed, right, zero)


def increment_of_P(P: Tensor, P_new: Tensor, Q: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(P - P_new) Q^T`` as two factors, (layers, m, r) and (layers, n, r).

    Args:
        P: (layers, m, r, ...), in a dtype that holds all factors exactly: that of the result.
        P_new: (layers, m, r, ...), as PEFT stores it.
        Q: (layers, r, n, ...), likewise.
        kept: (layers, 1), which layers keep all they have: their factors are zero.
    """
    kept = kept.unsqueeze(-1)
    left = (P.flatten(2) - P_new.flatten(2)).masked_fill_(kept, 0)
    # Zero where it is looked at, and it says in which dtype: a process may hold no rows.
    zero = left[:, :1, :1] if left.numel() else left.new_zeros((1, 1, 1))
    return left, torch.where(kept, zero, Q.flatten(2).mT)


def increment_columns(pair: LoRAPair, *, P_alone: bool) -> int:
    """Return k of the layer's increments.

    Args:
        pair: the layer.
        P_alone: whether Q stays as it is.
    """
    P, Q = pair.P_parameter, pair.Q_parameter
    exact = P.dtype in _EXACT and Q.dtype == P.dtype
    return pair.rank if P_alone or exact else 2 * pair.rank
