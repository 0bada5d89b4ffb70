"""The algebra of a carry: a low-rank sum ``up @ down``, recompressed when it is full.

Where it has fewer bits than the adapter, what rounding cuts stays in the adapter.

Held by tests/carry/test_carry.py and tests/carry/test_carry_rounding.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scalora.sharding.rows import HERE, Rows


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


def compress(up: Tensor, down: Tensor, rank: int, rows: Rows = HERE) -> Compressed:
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
        rows: who holds the rows of ``up`` and the columns of ``down``; with several processes these
            are the ones held here, and so are the result's.
    """
    work = torch.float32 if up.device.type == "mps" else torch.float64
    basis, triangle = _tall_qr(up.to(work), rows)
    wide = down.to(work)
    core = triangle @ rows.sum(wide @ wide.mT) @ triangle.mT
    energies, vectors = torch.linalg.eigh(core)
    energies, vectors = energies.flip(-1).clamp_min(0), vectors.flip(-1)
    k = min(rank, energies.shape[-1])
    # Both factors get the root of the singular value: half-precision copies of them stay normal.
    # A floor, and not zero, keeps their product exact where nothing is left out.
    floor = energies[..., :1].clamp_min(torch.finfo(work).tiny) * torch.finfo(work).eps
    root = energies[..., :k].clamp_min(floor).sqrt().sqrt()
    inverse = 1 / root
    new_up = (basis @ (vectors[..., :k] * root.unsqueeze(-2))).to(up.dtype)
    back = (vectors[..., :k] * inverse.unsqueeze(-2)).mT @ triangle
    new_down = (back @ wide).to(down.dtype)
    return Compressed(
        torch.nn.functional.pad(new_up, (0, rank - k)),
        torch.nn.functional.pad(new_down, (0, 0, 0, rank - k)),
        energies[..., k:].sum(-1),
        energies.sum(-1),
    )


def _tall_qr(matrix: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return (..., m, k) with orthonormal columns over all rows, and (..., k, c), alike everywhere.

    Every process factorises its rows, and all of them the triangles of all (TSQR: Demmel et al.,
    SIAM J. Sci. Comput. 34, 2012).
    """
    basis, triangle = torch.linalg.qr(matrix)
    if rows.processes == 1:
        return basis, triangle
    c = matrix.shape[-1]
    missing = c - triangle.shape[-2]  # fewer rows here than columns
    basis = torch.nn.functional.pad(basis, (0, missing))
    triangle = torch.nn.functional.pad(triangle, (0, 0, 0, missing))
    stacked = rows.each(triangle).movedim(0, -3).flatten(-3, -2)
    turns, triangle = torch.linalg.qr(stacked)
    first = rows.index * c
    return basis @ turns[..., first : first + c, :], triangle


def inner_product(
    up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor, rows: Rows = HERE
) -> Tensor:
    """Return the Frobenius inner product of ``up @ down`` and ``other_up @ other_down``: (...,).

    Neither product is formed.

    Args:
        up, other_up: (..., m, c) and (..., m, d).
        down, other_down: (..., c, n) and (..., d, n).
        rows: who holds the m rows and the n columns, as for `compress`.
    """
    left, right = rows.sum(torch.stack([up.mT @ other_up, down @ other_down.mT]))
    return (left * right).sum(dim=(-2, -1))


def relative_cut(
    cut: Tensor,
    energy: Tensor,
    up: Tensor,
    down: Tensor,
    P: Tensor,
    Q: Tensor,
    rows: Rows = HERE,
) -> Tensor:
    """Return the energy cut from a carry over that of carry and adapter together: (...,).

    Together, because the two cancel in part: what a re-basing adds to one it takes from the other.

    Args:
        cut: (...,), what was cut.
        energy: (...,), of the carry, ``up @ down``.
        up, down: (..., m, c) and (..., c, n), float32 at least.
        P, Q: (..., m, r) and (..., r, n), the adapter's.
        rows: who holds the m rows and the n columns, as for `compress`.
    """
    P, Q = P.to(up.dtype), Q.to(down.dtype)
    both = inner_product(up, down, P, Q, rows)
    learned = energy + 2 * both + inner_product(P, Q, P, Q, rows)
    learned = learned.clamp_min(torch.finfo(up.dtype).eps * energy)
    return torch.where(cut > 0, cut / learned, 0)


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
        rows: who holds the m rows and the n columns, as for `compress`.
    """
    narrow_up, narrow_down = rounded(up, dtype), rounded(down, dtype)
    change_up = torch.cat([up - narrow_up, narrow_up], dim=-1)
    change_down = torch.cat([down, down - narrow_down], dim=-2)
    return inner_product(change_up, change_down, change_up, change_down, rows)
