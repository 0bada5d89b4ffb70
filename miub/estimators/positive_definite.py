"""Gram matrices and other positive definite matrices, by their Cholesky factors.

Nothing here waits for the device: the ``_ex`` forms do not check their factorisations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_BLOCK = 128  # rows of a product that are worth a call of their own
_LEAF = 64  # size from which halves of a triangle are inverted apart


def add_outer_product(gram: Tensor, x: Tensor) -> None:
    """Add ``x x^T`` to a Gram matrix (..., k, k) in place, for x (..., k, l).

    On a CPU by blocks of rows, and only as far as the last block on the diagonal: a factorisation
    reads the lower triangle alone.  Elsewhere more calls would cost more than the other half.
    """
    size = x.shape[-2]
    gram, x = gram.view(-1, size, size), x.reshape(-1, size, x.shape[-1])
    step = max(_LEAST_BLOCK, -(-size // 4)) if x.device.type == "cpu" else size
    for start in range(0, size, step):
        end = min(start + step, size)
        gram[:, start:end, :end].baddbmm_(x[:, start:end], x[:, :end].mT)


def cholesky(gram: Tensor, penalty: Tensor) -> Tensor:
    """Return the lower factor of ``gram + penalty I``.

    Args:
        gram: (..., k, k), of which the lower triangle is read.
        penalty: (..., 1, 1).
    """
    penalised = gram.clone()
    penalised.diagonal(dim1=-2, dim2=-1).add_(penalty.squeeze(-1))
    return torch.linalg.cholesky_ex(penalised)[0]


def inverse_of_triangle(factor: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix (..., k, k).

    On a CPU the blocks on the diagonal are inverted together, then pairs of neighbours are put
    together, ``[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]``: products, where a
    triangular solve with the identity takes several times as long.  Elsewhere it is one call.
    """
    size, halvings = factor.shape[-1], 0
    leaf = _LEAF if factor.device.type == "cpu" else size
    while size > leaf << halvings:
        halvings += 1
    width = -(-size >> halvings)
    blocks = 1 << halvings
    padding = blocks * width - size
    if padding:  # with the identity, whose inverse it is
        factor = torch.nn.functional.pad(factor, (0, padding, 0, padding))
        factor.diagonal(dim1=-2, dim2=-1)[..., size:] = 1
    tiles = _diagonal_tiles(factor, width)
    identity = torch.eye(width, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(tiles, identity.expand_as(tiles), upper=False)
    while width < factor.shape[-1]:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        width *= 2
        between = _diagonal_tiles(factor, width)[..., width // 2 :, : width // 2]
        inverse = factor.new_zeros(*first.shape[:-2], width, width)
        inverse[..., : width // 2, : width // 2] = first
        inverse[..., width // 2 :, width // 2 :] = second
        inverse[..., width // 2 :, : width // 2] = -(second @ (between @ first))
    return inverse[..., 0, :size, :size]


def _diagonal_tiles(matrix: Tensor, width: int) -> Tensor:
    """Return the square blocks on the diagonal, (..., k / width, width, width)."""
    count = matrix.shape[-1] // width
    tiles = matrix.unflatten(-1, (count, width)).unflatten(-3, (count, width))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def logdet(covariance: Tensor) -> Tensor:
    """Return the log determinants (...) of positive definite matrices (..., r, r)."""
    factor = torch.linalg.cholesky_ex(covariance)[0]
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def jitter(covariance: Tensor) -> Tensor:
    """Return the multiple of the identity that keeps a covariance positive definite as rounded."""
    r = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    finfo = torch.finfo(covariance.dtype)
    identity = torch.eye(r, dtype=covariance.dtype, device=covariance.device)
    return (8 * finfo.eps * level + finfo.tiny) * identity


def squared_lengths(x: Tensor, covariance: Tensor) -> Tensor:
    """Return ``x_i' covariance^-1 x_i`` (..., N) for x (..., N, r)."""
    factor = torch.linalg.cholesky_ex(covariance)[0]
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).square().sum(-2)
