"""The algebra of a carry: a low-rank sum ``up @ down`` that is recompressed when it is full."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Compressed(NamedTuple):
    """The best approximation of ``up @ down`` by fewer columns.

    Attributes:
        up: (..., m, k).
        down: (..., k, n); row j and column j of ``up`` have the same norm, and j runs from the
            largest singular value to the smallest.
        cut: (...,), the energy that was left out: the squared Frobenius norm of the difference.
        energy: (...,), that of ``up @ down``.
    """

    up: Tensor
    down: Tensor
    cut: Tensor
    energy: Tensor


def compress(up: Tensor, down: Tensor, rank: int) -> Compressed:
    """Keep the ``rank`` largest singular values of ``up @ down``, for any batch dimensions.

    With ``up = O R`` (QR), ``up @ down = O (R down)``: the left singular vectors are O times the
    eigenvectors of the small ``(R down) (R down)^T``, and to keep some of them is to project on
    them.  By Eckart and Young no matrix of that rank is closer; (m, n) is never formed.  In float64
    (float32 where the device has none) squaring costs singular values below 1e-8 of the largest,
    which is less than the result's rounding.  An eigendecomposition waits for the device.

    Args:
        up: (..., m, c).
        down: (..., c, n).
        rank: how many columns to return; more than there are is filled up with zeros.
    """
    work = torch.float32 if up.device.type == "mps" else torch.float64
    basis, triangle = torch.linalg.qr(up.to(work))
    wide = down.to(work)
    core = triangle @ (wide @ wide.mT) @ triangle.mT
    energies, vectors = torch.linalg.eigh(core)
    energies, vectors = energies.flip(-1).clamp_min(0), vectors.flip(-1)
    k = min(rank, energies.shape[-1])
    # Both factors get the root of the singular value: half-precision copies of them stay normal.
    root = energies[..., :k].sqrt().sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    new_up = (basis @ (vectors[..., :k] * root.unsqueeze(-2))).to(up.dtype)
    rows = (vectors[..., :k] * inverse.unsqueeze(-2)).mT @ triangle
    new_down = (rows @ wide).to(down.dtype)
    return Compressed(
        torch.nn.functional.pad(new_up, (0, rank - k)),
        torch.nn.functional.pad(new_down, (0, 0, 0, rank - k)),
        energies[..., k:].sum(-1),
        energies.sum(-1),
    )
