"""Renewal: a column that has learned for long is frozen, and a new one takes its place.

Column j of the factors is frozen as it is, ``s P_j Q_j^T``, and begins anew as LoRA begins: ``P_j``
zero and ``Q_j`` random, as long as it was.  The model's function does not change.  One column of a
layer at a time, so the others go on learning (SwitchLoRA, arXiv 2406.06564, exchanges vectors
likewise; ReLoRA, arXiv 2307.05695, all columns at once).  Momenta of the column are forgotten: they
point where the old one was going.  Second moments stay: a new column of the old one's length has
gradients of about that size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalora import sharding
from scalora.inner_states import moved_states
from scalora.layer_batches import LayerBatch, Write, gradients, stack, widened
from scalora.moments import Moments, transfer

_P_RANK_AXIS, _Q_RANK_AXIS = 2, 1  # of a stack (layers, *parameter shape)

LATEST = 0.3
"""Share of the highest learning rate below which no column is renewed: it could learn no more."""


def due_columns(rank: int, lifetime: int, before: int, now: int) -> list[int]:
    """The columns of a layer to renew after step ``now``, where it was asked after ``before``.

    Column j is due ``j lifetime / rank`` steps after the first lifetime is over, and one lifetime
    after that again, so that the renewals of a layer are spread evenly.

    Args:
        rank: of the layer.
        lifetime: steps of a column.
        before, now: numbers of steps done, 0 <= before <= now.
    """

    def ended(steps: int) -> int:
        return max(0, (steps - lifetime) * rank // lifetime + 1)

    first, last = ended(before), ended(now)
    return sorted({index % rank for index in range(max(first, last - rank), last)})


def renewed(
    batch: LayerBatch,
    optimizer: torch.optim.Optimizer,
    moments: Moments,
    columns: Sequence[int],
    seeds: Sequence[int],
) -> tuple[Tensor, Tensor, list[Write]]:
    """What is frozen, and everything that changes, with new columns in a batch of layers.

    Args:
        batch: the layers.
        optimizer: the inner optimizer, whose momenta of these columns are forgotten.
        moments: the entry of its class.
        columns: which.
        seeds: one a layer, of the new columns' directions.

    Returns:
        ``left`` (layers, m, k) and ``right`` (layers, n, k) with ``s left right^T`` frozen, the
        rows held here, and the writes of factors, gradients and momenta.
    """
    P, Q, rows = stack(batch.P), stack(batch.Q), sharding.rows_of(batch.Q[0])
    shares = rows.slices(batch.Q[0].shape[0])
    own = shares[rows.index]
    # Column by column: an index that is a list would have to be copied to the device.
    left = widened(torch.stack([P[:, :, j] for j in columns], 2)).flatten(2)
    held = [Q[:, j - own.start] for j in columns if own.start <= j < own.stop]
    old = torch.stack(held, 1) if held else Q[:, :0]
    counts = [sum(share.start <= j < share.stop for j in columns) for share in shares]
    right = widened(rows.turned(old.flatten(2), counts)).mT
    keep = torch.ones(P.shape[0], P.shape[2], device=P.device)
    P_new, Q_new = P.clone(), Q.clone()
    lengths = rows.sum(right.norm(dim=1).square()).sqrt()
    new_columns = _random_columns(Q, lengths, seeds)
    for j, new in zip(columns, new_columns.unbind(1), strict=True):
        keep[:, j] = 0
        P_new[:, :, j] = 0
        if own.start <= j < own.stop:
            Q_new[:, j - own.start] = new
    writes: list[Write] = [(batch.P, P, P_new), (batch.Q, Q, Q_new)]
    for parameters, kept, axis in (
        (batch.P, keep, _P_RANK_AXIS),
        (batch.Q, keep[:, own], _Q_RANK_AXIS),
    ):
        grads = gradients(parameters)
        stacked = stack(grads)
        writes.append((grads, stacked, transfer(stacked, kept, 1, axis)))
        momenta = _momenta(optimizer, moments, parameters)
        writes += moved_states(optimizer, momenta, parameters, kept, axis)
    # A layer that has gone astray keeps it to itself: its base stays clean.
    finite = (left.sum((1, 2)) + right.sum((1, 2))).isfinite()
    finite = sharding.everywhere(finite, batch.P[0])[:, None, None]
    left, right = torch.where(finite, left, 0), torch.where(finite, right, 0)
    return left, right, [(targets, old, new.to(old.dtype)) for targets, old, new in writes]


def _random_columns(Q: Tensor, lengths: Tensor, seeds: Sequence[int]) -> Tensor:
    """Directions drawn evenly, (layers, k, n, ...), of those lengths, (layers, k).

    Whole on every process, and the same there.
    """
    shape = (lengths.shape[1], *Q.shape[2:])
    drawn = [
        torch.randn(shape, generator=_generator(seed, Q.device), device=Q.device) for seed in seeds
    ]
    new = torch.stack(drawn).flatten(2)
    new = new / new.norm(dim=-1, keepdim=True) * lengths.unsqueeze(-1)
    return new.view(-1, *shape).to(Q.dtype)


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _momenta(
    optimizer: torch.optim.Optimizer, moments: Moments, parameters: Sequence[nn.Parameter]
) -> Moments:
    """The table's entry, with degree 1 for what points somewhere and 0 for what stays as it is."""
    state = optimizer.state.get(parameters[0], {})

    def points(name: str, degree: int) -> bool:
        if name in moments.norms:
            return False
        # A momentum of steps that were divided by a root of a second moment has degree 0.
        value = state.get(name)
        whole = isinstance(value, Tensor) and value.shape == parameters[0].shape
        return degree == 1 or (degree == 0 and whole)

    degrees = {name: int(points(name, degree)) for name, degree in moments.degrees.items()}
    return dataclasses.replace(moments, degrees=degrees)
