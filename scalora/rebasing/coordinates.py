"""New coordinates of layers, computed but not yet written: factors, history and increments.

Held by tests/peft_layers/test_layers.py and tests/moments/test_moments.py.

With ``P~ = P diag(alpha)`` and ``Q~ = Q diag(beta)`` gradients and moments of P move with beta and
those of Q with alpha, and the weight takes in ``P Q^T - P~ Q~^T`` (docs/mathematics.md, re-basing).
A layer in which anything is not finite, before or after, keeps all it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalora import sharding
from scalora.moments.history import FactorHistory, Moved, Powers, Write, along, sums, times
from scalora.peft_layers import LoRAPair
from scalora.rebasing.batches import LayerBatch, places

_LEAST = torch.float32  # increments are computed in that or wider
_EXACT = (torch.float32, torch.float64)
P_RANK_AXIS, Q_RANK_AXIS = 2, 1  # of a stack (layers, *parameter shape)


@dataclass(frozen=True)
class Rebased:
    """A batch in new coordinates.

    Attributes:
        batch: the layers.
        alpha: (layers, r), the scaling of P's columns.
        beta: (layers, r), that of Q's; None where Q stays as it is.
        left, right: (layers, m, k) and (layers, n, k), the increments; the rows held here.
        writes: factors, gradients and moments.
    """

    batch: LayerBatch
    alpha: Tensor
    beta: Tensor | None
    left: Tensor
    right: Tensor
    writes: Sequence[Write]


def with_P_scaled(
    batches: Sequence[LayerBatch], histories: Sequence[FactorHistory], alpha: Tensor
) -> Iterator[Rebased]:
    """Yield batches with ``P~ = P diag(alpha)``, and Q as it is.

    Args:
        batches: of one device, rank and way of sharding.
        histories: of Q, for each batch.
        alpha: (all layers, r), or (all layers, 1) for one factor for all columns; in (0, 1], with
            which what is finite stays finite.
    """
    first = batches[0]
    wide = torch.promote_types(torch.promote_types(first.P[0].dtype, first.Q[0].dtype), _LEAST)
    factors = [sharding.stack(batch.P).to(wide) for batch in batches]
    totals = [[sums(P.unsqueeze(0)), *Q.totals] for P, Q in zip(factors, histories, strict=True)]
    kept = _broken(totals, first.P[0]).unsqueeze(-1)
    alpha = alpha.masked_fill(kept, 1.0)
    of_P = of_Q = Powers(alpha)
    if sharding.is_sharded(first.Q[0]) and alpha.shape[-1] > 1:
        of_Q = Powers(alpha[:, sharding.own_rows(first.Q[0])])
    for batch, layers, P, Q in zip(batches, places(batches), factors, histories, strict=True):
        shape, dtype = (len(batch.pairs), batch.rank), batch.P[0].dtype
        new = torch.empty_like(P, dtype=dtype)
        torch.mul(P, along(of_P.first(P.dtype)[layers], P.ndim, 0, P_RANK_AXIS), out=new)
        columns = sharding.own_columns(Q.parameter, batch.Q[0])
        left, right = _increment_of_P(P, new, columns, kept[layers])
        writes: list[Write] = [(batch.P, P, new), *_writes(Q.moved(of_Q, layers))]
        yield Rebased(batch, alpha[layers].expand(shape), None, left, right, writes)


def with_both_scaled(
    batches: Sequence[LayerBatch],
    histories: Sequence[tuple[FactorHistory, FactorHistory]],
    alpha: Tensor,
    beta: Tensor,
) -> Iterator[Rebased]:
    """Yield batches with ``P~ = P diag(alpha)`` and ``Q~ = Q diag(beta)``.

    Args:
        batches: of one device, rank and way of sharding.
        histories: of P and of Q, for each batch.
        alpha, beta: (all layers, r).
    """
    like, own = batches[0].P[0], sharding.own_rows(batches[0].Q[0])
    of_alpha, of_beta = Powers(alpha), Powers(beta)
    own_alpha, own_beta = (
        (Powers(alpha[:, own]), Powers(beta[:, own]))
        if sharding.is_sharded(like)
        else (of_alpha, of_beta)
    )
    found: list[list[Moved]] = []
    for batch, layers, (P, Q) in zip(batches, places(batches), histories, strict=True):
        new_P = _scaled(P.parameter, of_alpha, layers, P_RANK_AXIS)
        new_Q = _scaled(Q.parameter, own_beta, layers, Q_RANK_AXIS)
        found.append(
            [
                Moved([batch.P], P.parameter.unsqueeze(0), new_P.unsqueeze(0)),
                Moved([batch.Q], Q.parameter.unsqueeze(0), new_Q.unsqueeze(0)),
                *P.moved(of_beta, layers),
                *Q.moved(own_alpha, layers),
            ]
        )
    totals = [[sums(part.new) for part in moved] for moved in found]
    broken = _broken(totals, like)
    kept = broken.unsqueeze(-1)
    alpha, beta = alpha.masked_fill(kept, 1.0), beta.masked_fill(kept, 1.0)
    product = alpha * beta
    for batch, layers, moved in zip(batches, places(batches), found, strict=True):
        moved = [part.unless(broken[layers]) for part in moved]
        factors = _factors(batch, moved, beta[layers])
        left, right = _increment(*factors, product[layers])
        yield Rebased(batch, alpha[layers], beta[layers], left, right, _writes(moved))


def increment_columns(pair: LoRAPair, *, P_alone: bool) -> int:
    """Return k of the layer's increments.

    Args:
        pair: the layer.
        P_alone: whether Q stays as it is.
    """
    P, Q = pair.P_parameter, pair.Q_parameter
    exact = P.dtype in _EXACT and Q.dtype == P.dtype
    return pair.rank if P_alone or exact else 2 * pair.rank


def _increment(
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


def _increment_of_P(P: Tensor, P_new: Tensor, Q: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
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


def _factors(
    batch: LayerBatch, moved: Sequence[Moved], beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P before and after, the rows held here; Q, the columns held here."""
    P, Q = moved[0], moved[1]
    old, new = Q.old[0], Q.new[0]
    if sharding.is_sharded(batch.Q[0]):
        # The same products as of the own rows, to the bit: cheaper than sending them as well.
        old = sharding.own_columns(old, batch.Q[0])
        new = _scaled(old, Powers(beta), slice(None), Q_RANK_AXIS)
    return P.old[0], P.new[0], old, new


def _scaled(stacked: Tensor, powers: Powers, layers: slice, axis: int) -> Tensor:
    """Return the columns of (layers, *parameter shape) times their factors, rounded once."""
    return times(stacked, along(powers.first(stacked.dtype)[layers], stacked.ndim, 0, axis))


def _broken(totals: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
    """Return the layers in which anything is not finite, on any process: (all layers,), bool.

    Args:
        totals: of each batch, some (layers,) that are not finite where something is not.
        like: a parameter that is sharded as all are.
    """
    most = max(map(len, totals))
    rows = [[*parts, *[parts[0]] * (most - len(parts))] for parts in totals]
    flat = torch.cat([row[i] for i in range(most) for row in rows]).unflatten(0, (most, -1))
    broken = (flat - flat).ne(0).any(0)  # inf - inf and nan - nan are no zeros
    if not sharding.is_sharded(like):
        return broken
    return sharding.everywhere(broken.logical_not(), like).logical_not()


def _writes(moved: Sequence[Moved]) -> list[Write]:
    return [write for part in moved for write in part.writes()]
