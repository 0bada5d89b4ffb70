"""Carrying optimizer state across a re-basing, exactly.

Held by tests/moments/test_moments.py and tests/moments/test_blockwise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transfer(state: Tensor, factor: Tensor, degree: int, rank_axis: int) -> Tensor:
    """Return a state of ``degree`` in the gradient history in the new coordinates, a new tensor.

    The gradient of ``P diag(alpha)`` is ``g_P diag(beta)``: each factor's state carries the
    *other* factor's scaling (docs/mathematics.md, moments).

    Args:
        state: (layers, *parameter shape), or with the axes other than the rank's reduced to 1.
        factor: (layers, r): beta for P's state, alpha for Q's.
        degree: 0, 1 or 2 (any non-negative integer).
        rank_axis: the axis of ``state`` that runs over the r columns.
    """
    if degree == 0:
        return state.clone()
    return state * _along(factor.pow(degree).to(_compute(state)), state.ndim, rank_axis)


def transfer_reduced(
    state: Tensor, partner: Tensor, factor: Tensor, degree: int, rank_axis: int
) -> Tensor:
    """Return a state that was averaged over the rank axis (Adafactor's other factor), moved.

    ``mean_j g_ij^2`` does not remember its columns.  Under the rank-one model in which Adafactor
    keeps second moments, ``v_ij = R_i C_j / mean(C)``, scaling column j by ``f_j^2`` multiplies
    ``R`` by ``mean_j(f_j^2 C_j) / mean_j(C_j)``: exact where the model is.

    Args:
        state: (layers, ...), size 1 along ``rank_axis``.
        partner: (layers, ...), the factor that runs along ``rank_axis``, before its transfer.
        factor, degree, rank_axis: as in `transfer`.
    """
    weights = _along(factor.pow(degree).to(_compute(state)), partner.ndim, rank_axis)
    total = partner.sum(rank_axis, keepdim=True)
    ratio = (partner * weights).sum(rank_axis, keepdim=True) / total
    return state * ratio.where(total > 0, weights.mean(rank_axis, keepdim=True))


def _compute(state: Tensor) -> torch.dtype:
    return torch.promote_types(state.dtype, torch.float32)


def _along(factor: Tensor, ndim: int, rank_axis: int) -> Tensor:
    shape = [1] * ndim
    shape[0], shape[rank_axis] = factor.shape
    return factor.reshape(shape)
