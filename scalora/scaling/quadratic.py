"""The quadratic model of one re-based step, built from four thin matrices.

Held by tests/scaling/test_scaling.py.

One step of the inner optimizer on the re-based pair moves the weight, to first order in the
learning rates, by ``D(x) = -sum_i x_i M_i`` with the 2r rank-one matrices
``M_j = s P_j U_Q,j^T`` and ``M_{r+j} = s U_P,j Q_j^T``.  Minimising ``|D* - D(x)|^2`` with the
full fine-tuning step ``D* = -G/L`` is ``min 1/2 x^T H x - lambda^T x``: ``H`` is the Gram matrix
of the ``M_i`` and ``lambda_i = <G, M_i>`` (for L = 1).  Derivation: docs/mathematics.md, the
optimal scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scalora.sharding.rows import HERE, Rows


class QuadraticModel(NamedTuple):
    """``1/2 x^T H x - lambda^T x`` over ``x = [x_P; x_Q]``, the weights of the ``M_i``.

    Attributes:
        H: (..., 2r, 2r), positive semidefinite, in the solver's dtype.
        lam: (..., 2r), for L = 1.
        degree: of the directions U in the gradient, so that ``x`` stands for the scalings
            ``alpha = (x_P / lr_Q)^(1/(1+degree))`` and ``beta = (x_Q / lr_P)^(1/(1+degree))``.
    """

    H: Tensor
    lam: Tensor
    degree: int = 1

    @property
    def rank(self) -> int:
        """The adapter's r."""
        return self.lam.shape[-1] // 2

    def step_size(self, x: Tensor) -> Tensor:
        """Return the predicted Frobenius norm of the weight's move, ``sqrt(x^T H x)``: (...,)."""
        squared = torch.einsum("...i,...ij,...j->...", x, self.H, x)
        return squared.clamp_min(0).sqrt()

    def tied(self) -> QuadraticModel:
        """Return the model with the columns of each factor tied together: rank 1, H 2 x 2."""
        r = self.rank
        blocks = self.H.unflatten(-1, (2, r)).unflatten(-3, (2, r)).sum(dim=(-3, -1))
        return QuadraticModel(blocks, self.lam.unflatten(-1, (2, r)).sum(-1), self.degree)


def joined(models: Sequence[QuadraticModel]) -> QuadraticModel:
    """Return several models of one rank and degree, (layers, ...) each, as one."""
    H, lam = (torch.cat(parts) for parts in ([m.H for m in models], [m.lam for m in models]))
    return QuadraticModel(H, lam, models[0].degree)


def solver_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no float64 (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def quadratic_model(
    P: Tensor,
    Q: Tensor,
    grad_P: Tensor,
    grad_Q: Tensor,
    direction_P: Tensor,
    direction_Q: Tensor,
    scaling: float = 1.0,
    degree: int = 1,
    rows: Rows = HERE,
) -> QuadraticModel:
    """Build ``H`` and ``lambda`` for any number of leading batch dimensions.

    Products with the long side run in the inputs' dtype, float32 at least; the (2r, 2r) problem
    is handed on in float64.  Gradients and directions are divided by their largest entry first,
    so that their squares neither overflow nor vanish in float32.

    Args:
        P, grad_P, direction_P: (..., m, r).
        Q, grad_Q, direction_Q: (..., n, r).
        scaling: PEFT's ``s`` in ``W = W0 + s P Q^T``.
        degree: of the directions in the gradient.
        rows: who holds the m and the n rows; with several processes these are the rows held here,
            and all processes find the same model.
    """
    dtype = torch.promote_types(P.dtype, torch.float32)
    P, Q = P.to(dtype), Q.to(dtype)
    given = direction_P, direction_Q, grad_P, grad_Q
    thin = {id(matrix): matrix.to(dtype) for matrix in given}  # most are the gradients
    units = rows.max(torch.stack([_largest(matrix) for matrix in thin.values()]))
    units = torch.where(units > 0, units, torch.ones_like(units))
    thin = {
        key: matrix / unit.unsqueeze(-1)
        for (key, matrix), unit in zip(thin.items(), units, strict=True)
    }
    direction_P, direction_Q, grad_P, grad_Q = (thin[id(matrix)] for matrix in given)

    left = torch.cat([P, direction_P], dim=-1)
    right = torch.cat([direction_Q, Q], dim=-1)
    work = solver_dtype(P.device)
    unit_of = dict(zip(thin, units.to(work), strict=True))
    unit_P, unit_Q, grad_unit_P, grad_unit_Q = (unit_of[id(matrix)] for matrix in given)
    left_gram, right_gram = rows.sum(torch.stack([left.mT @ left, right.mT @ right]).to(work))
    descents = torch.stack([(grad_Q * direction_Q).sum(-2), (grad_P * direction_P).sum(-2)])
    descent_Q, descent_P = rows.sum(descents.to(work))
    H = left_gram * right_gram
    # As much as the products' round-off can take away: H stays positive semidefinite.
    H = H + torch.diag_embed(H.diagonal(dim1=-2, dim2=-1) * H.shape[-1] * torch.finfo(dtype).eps)

    r = P.shape[-1]
    unit = torch.cat(
        [unit_Q.expand(*unit_Q.shape[:-1], r), unit_P.expand(*unit_P.shape[:-1], r)], -1
    )
    H = H * (scaling * scaling) * unit.unsqueeze(-1) * unit.unsqueeze(-2)
    lam = torch.cat([descent_Q * grad_unit_Q, descent_P * grad_unit_P], dim=-1) * unit
    return QuadraticModel(H, lam, degree)


def _largest(matrix: Tensor) -> Tensor:
    """Return the largest magnitude among the entries of (..., k, r): (..., 1)."""
    if matrix.shape[-2] == 0:  # more processes than rows
        return matrix.new_zeros(*matrix.shape[:-2], 1)
    return matrix.abs().amax(dim=(-2, -1)).unsqueeze(-1)
