"""Non-negative quadratic programs, many small ones at once, without leaving the device."""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 40
_TO_BOUNDARY = 0.995
_ROUNDS = 8


def minimize_nonnegative(H: Tensor, lam: Tensor) -> Tensor:
    """Solve ``min 1/2 x^T H x - lam^T x`` subject to ``x >= 0``.

    A primal-dual interior-point method (Mehrotra's predictor and corrector) finds which
    coordinates are free; one solve on those then gives the optimum itself, and is kept where it
    is feasible and no worse.  Nothing waits for the device.  On a GPU one kernel solves all
    problems (`scalora.scaling.nonnegative_kernel`); elsewhere the number of iterations is fixed.
    On a CPU looking costs nothing: there most problems are solved by pivoting, and the method
    stops when the others have converged.

    Args:
        H: (..., k, k), positive semidefinite; it may be singular if ``lam`` lies in its range.
        lam: (..., k).

    Returns:
        x: (..., k), non-negative; zero where the diagonal of ``H`` is.
    """
    batch, k = lam.shape[:-1], lam.shape[-1]
    H, lam = H.reshape(-1, k, k), lam.reshape(-1, k)
    eps = torch.finfo(H.dtype).eps
    ridge, tolerance = 8 * k * eps, 16 * eps
    if _kernel_applies(H):
        from scalora.scaling.nonnegative_kernel import minimize

        x = minimize(H, lam, ridge, tolerance, _TO_BOUNDARY, _ITERATIONS)
        return x.reshape(*batch, k)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    dead = (diagonal <= 0).to(diagonal.dtype)
    scale = (1 - dead) * (diagonal + dead).rsqrt()
    H = H * scale.unsqueeze(-1) * scale.unsqueeze(-2) + torch.diag_embed(dead)
    lam = lam * scale
    size = lam.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    H = H + ridge * torch.eye(k, dtype=H.dtype, device=H.device)

    lam = lam / size
    if lam.device.type != "cpu":
        x = _from_inside(H, lam, tolerance)
    else:
        x, rest = _pivoted(H, lam, tolerance)
        if len(rest):
            x[rest] = _from_inside(H[rest], lam[rest], tolerance)
    return (x * size * scale).reshape(*batch, k)


def _pivoted(H: Tensor, lam: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Try which coordinates are free, all at once: most problems are solved in a few rounds.

    A coordinate is free next if it is positive, or if it would grow from zero (block principal
    pivoting; Judice and Pires, Computers & Operations Research 21, 1994).  A problem whose free
    coordinates stay the same is solved; one that goes round in a circle is left to others.

    Args:
        H: (problems, k, k), with a unit diagonal.
        lam: (problems, k), with ``max |lam| = 1``.
        tolerance: of the slope along free coordinates, times k.

    Returns:
        x: (problems, k), and the indices of problems that it does not solve.
    """
    free = torch.ones_like(lam, dtype=torch.bool)
    for _ in range(_ROUNDS):
        x = _on_free(H, lam, free)
        slope = _apply(H, x) - lam
        wrong = torch.where(free, x > 0, slope < 0) != free
        if not bool(wrong.any()):
            break
        free = free ^ wrong
    inexact = torch.where(free, slope, 0).abs() > tolerance * lam.shape[-1]
    return x, (wrong | inexact).any(-1).nonzero().squeeze(-1)


def _from_inside(H: Tensor, lam: Tensor, tolerance: float) -> Tensor:
    """Return the optimum that an interior point leads to: (problems, k)."""
    x, z = _interior_point(H, lam, tolerance)
    return _polish(H, lam, x, free=x > z)


def _interior_point(H: Tensor, lam: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the primal ``x`` and the dual ``z = H x - lam``: (problems, k) each.

    Args:
        H: (problems, k, k), with a unit diagonal.
        lam: (problems, k), with ``max |lam| = 1``.
        tolerance: of the mean complementarity, and k times that of the residual.
    """
    k = lam.shape[-1]
    x, z = torch.ones_like(lam), torch.ones_like(lam)
    for _ in range(_ITERATIONS):
        residual = _apply(H, x) - lam - z
        gap = (x * z).mean(-1, keepdim=True)
        done = (gap <= tolerance) & (residual.abs().amax(-1, keepdim=True) <= tolerance * k)
        if done.device.type == "cpu" and bool(done.all()):
            break
        factor, _ = torch.linalg.cholesky_ex(H + torch.diag_embed(z / x))

        dx = _solve(factor, -residual - z)
        dz = -z - z / x * dx
        step = _step_length(x, dx, z, dz)
        affine_gap = ((x + step * dx) * (z + step * dz)).mean(-1, keepdim=True)
        centre = (affine_gap / gap).pow(3) * gap - dx * dz

        dx = _solve(factor, -residual - z + centre / x)
        dz = (centre - z * dx) / x - z
        step = _TO_BOUNDARY * _step_length(x, dx, z, dz)
        moved_x, moved_z = x + step * dx, z + step * dz
        keep = done | (moved_x + moved_z).sum(-1, keepdim=True).isfinite().logical_not()
        x, z = torch.where(keep, x, moved_x), torch.where(keep, z, moved_z)
    return x, z


def _polish(H: Tensor, lam: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """Return the optimum on the free coordinates where that is the optimum, else ``x``."""
    exact = _on_free(H, lam, free)
    feasible = (torch.isfinite(exact) & (exact >= 0)).all(-1, keepdim=True)
    exact = torch.where(feasible, exact, x)
    better = _objective(H, lam, exact) <= _objective(H, lam, x)
    return torch.where(better, exact, x)


def _on_free(H: Tensor, lam: Tensor, free: Tensor) -> Tensor:
    """Return the optimum over the free coordinates alone, of any sign; the others are zero."""
    pairs = free.unsqueeze(-1) & free.unsqueeze(-2)
    identity = torch.eye(lam.shape[-1], dtype=H.dtype, device=H.device)
    factor, _ = torch.linalg.cholesky_ex(torch.where(pairs, H, identity))
    return _solve(factor, torch.where(free, lam, torch.zeros_like(lam)))


def _apply(H: Tensor, x: Tensor) -> Tensor:
    return (H @ x.unsqueeze(-1)).squeeze(-1)


def _solve(factor: Tensor, rhs: Tensor) -> Tensor:
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)


def _objective(H: Tensor, lam: Tensor, x: Tensor) -> Tensor:
    return (x * (0.5 * _apply(H, x) - lam)).sum(-1, keepdim=True)


def _step_length(x: Tensor, dx: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """Return the longest step up to 1 that keeps ``x`` and ``z`` non-negative: (..., 1)."""
    both, move = torch.cat([x, z], -1), torch.cat([dx, dz], -1)
    limit = torch.where(move < 0, -both / move, torch.full_like(both, torch.inf))
    return limit.amin(-1, keepdim=True).clamp_max(1.0)


def _kernel_applies(H: Tensor) -> bool:
    if H.device.type != "cuda" or H.dtype != torch.float64 or not len(H):
        return False
    try:
        from scalora.scaling import nonnegative_kernel
    except ImportError:  # Triton is not everywhere
        return False
    return H.shape[-1] <= nonnegative_kernel.LARGEST
