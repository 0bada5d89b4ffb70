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

    By a QR of both factors and an SVD of the small core; (m, n) is never formed.  By Eckart and
    Young no matrix of that rank is closer.  All of it in float64 (float32 where the device has
    none), so that what is kept is exact to the precision of the result; it is cast back.  An SVD
    waits for the device.

    Args:
        up: (..., m, c).
        down: (..., c, n).
        rank: how many columns to return; more than there are is filled up with zeros.
    """
    work = torch.float32 if up.device.type == "mps" else torch.float64
    left, left_core = torch.linalg.qr(up.to(work))
    right, right_core = torch.linalg.qr(down.to(work).mT)
    U, sigma, Vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    k = min(rank, sigma.shape[-1])
    root = sigma[..., :k].sqrt()
    new_up = (left @ (U[..., :k] * root.unsqueeze(-2))).to(up.dtype)
    new_down = ((root.unsqueeze(-1) * Vh[..., :k, :]) @ right.mT).to(down.dtype)
    return Compressed(
        torch.nn.functional.pad(new_up, (0, rank - k)),
        torch.nn.functional.pad(new_down, (0, 0, 0, rank - k)),
        sigma[..., k:].square().sum(-1),
        sigma.square().sum(-1),
    )
