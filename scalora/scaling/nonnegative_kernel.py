"""`scalora.scaling.nonnegative` as one Triton kernel: a program per problem, in float64.

It is the same method, and stops where its own problem has converged.  A problem stays in registers,
so its matrix may have 64 rows at most (adapters of rank 32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64  # rows of a problem


@triton.jit
def _minimize_kernel(
    matrices,
    vectors,
    solutions,
    k,
    ridge,
    tolerance,
    to_boundary,
    iterations,
    size: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, size)
    row, column = i[:, None], i[None, :]
    inside = i < k
    H = tl.load(
        matrices + problem * k * k + row * k + column, mask=(row < k) & (column < k), other=0.0
    )
    lam = tl.load(vectors + problem * k + i, mask=inside, other=0.0)

    # Coordinates without curvature, and those that fill up a power of two, stay at zero.
    diagonal = tl.sum(tl.where(row == column, H, 0.0), 1)
    dead = diagonal <= 0
    scale = tl.where(dead, 0.0, 1.0 / tl.sqrt(tl.where(dead, 1.0, diagonal)))
    H = H * scale[:, None] * scale[None, :]
    H += tl.where(row == column, tl.where(dead, 1.0, 0.0)[:, None] + ridge, 0.0)
    lam = lam * scale
    unit = tl.max(tl.abs(lam), 0)
    unit = tl.where(unit > 0, unit, 1.0)
    lam = lam / unit

    x = tl.zeros_like(lam) + 1.0
    z = tl.zeros_like(lam) + 1.0
    count = 0
    going = k > 0
    while going & (count < iterations):
        residual = tl.sum(H * x[None, :], 1) - lam - z
        gap = tl.sum(tl.where(inside, x * z, 0.0), 0) / k
        largest = tl.max(tl.where(inside, tl.abs(residual), 0.0), 0)
        going = (gap > tolerance) | (largest > tolerance * k)
        if going:
            weights = z / x
            inverse = _inverse(
                H + tl.where(row == column, weights[:, None], 0.0), row, column, size
            )

            dx = _solve(inverse, H, weights, -residual - z)
            dz = -z - weights * dx
            step = _step_length(x, dx, z, dz)
            affine = tl.sum(tl.where(inside, (x + step * dx) * (z + step * dz), 0.0), 0) / k
            share = affine / gap
            centre = share * share * share * gap - dx * dz

            dx = _solve(inverse, H, weights, -residual - z + centre / x)
            dz = (centre - z * dx) / x - z
            step = to_boundary * _step_length(x, dx, z, dz)
            moved_x, moved_z = x + step * dx, z + step * dz
            total = tl.sum(moved_x + moved_z, 0)
            finite = total - total == 0
            x, z = tl.where(finite, moved_x, x), tl.where(finite, moved_z, z)
            going = finite
        count += 1

    free = x > z
    both = free[:, None] & free[None, :]
    identity = tl.where(row == column, 1.0, 0.0)
    part = tl.where(both, H, identity)
    inverse = _inverse(part, row, column, size)
    exact = _solve(inverse, part, tl.zeros_like(x), tl.where(free, lam, 0.0))
    infeasible = tl.sum(tl.where((exact >= 0) & (exact - exact == 0), 0, 1), 0)
    exact = tl.where(infeasible == 0, exact, x)
    better = _objective(H, lam, exact) <= _objective(H, lam, x)
    x = tl.where(better, exact, x)
    tl.store(solutions + problem * k + i, x * unit * scale, mask=inside)


@triton.jit
def _inverse(matrix, row, column, size: tl.constexpr):
    """Return the inverse of a positive definite matrix, by a sweep over each of its columns."""
    for j in range(0, size):
        pivot_column = tl.sum(tl.where(column == j, matrix, 0.0), 1)
        pivot = tl.sum(tl.where((row == j) & (column == j), matrix, 0.0))
        share = pivot_column / pivot
        swept = matrix - pivot_column[:, None] * share[None, :]
        swept = tl.where(row == j, share[None, :], tl.where(column == j, share[:, None], swept))
        matrix = tl.where((row == j) & (column == j), -1.0 / pivot, swept)
    return -matrix


@triton.jit
def _solve(inverse, H, weights, rhs):
    """Return the solution of ``(H + diag(weights)) x = rhs``, its round-off taken back once."""
    x = tl.sum(inverse * rhs[None, :], 1)
    left = rhs - tl.sum(H * x[None, :], 1) - weights * x
    return x + tl.sum(inverse * left[None, :], 1)


@triton.jit
def _step_length(x, dx, z, dz):
    """Return the longest step up to 1 that keeps ``x`` and ``z`` non-negative."""
    limit_x = tl.where(dx < 0, -x / tl.where(dx < 0, dx, -1.0), 1.0)
    limit_z = tl.where(dz < 0, -z / tl.where(dz < 0, dz, -1.0), 1.0)
    return tl.minimum(tl.min(tl.minimum(limit_x, limit_z), 0), 1.0)


@triton.jit
def _objective(H, lam, x):
    return tl.sum(x * (0.5 * tl.sum(H * x[None, :], 1) - lam), 0)


@torch.library.custom_op(
    "scalora::minimize_nonnegative",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor H, Tensor lam, float ridge, float tolerance, float to_boundary, "
    "int iterations) -> Tensor",
)
def minimize(
    H: Tensor, lam: Tensor, ridge: float, tolerance: float, to_boundary: float, iterations: int
) -> Tensor:
    """Solve the problems as `scalora.scaling.nonnegative.minimize_nonnegative` does.

    Args:
        H: (problems, k, k), float64, k at most `LARGEST`.
        lam: (problems, k).
        ridge: added to the diagonal of H once it is 1.
        tolerance: of the mean complementarity, and k times that of the residual.
        to_boundary: share of the way to the boundary that a step may go.
        iterations: the most.
    """
    return launch(H, lam, ridge, tolerance, to_boundary, iterations)


@minimize.register_fake
def _like(
    H: Tensor, lam: Tensor, ridge: float, tolerance: float, to_boundary: float, iterations: int
) -> Tensor:
    return torch.empty_like(lam)


def launch(
    H: Tensor, lam: Tensor, ridge: float, tolerance: float, to_boundary: float, iterations: int
) -> Tensor:
    """Launch the kernel; arguments as for `minimize`."""
    problems, k = lam.shape
    solutions = torch.empty_like(lam, memory_format=torch.contiguous_format)
    size = max(2, triton.next_power_of_2(k))
    # Triton launches on the current device, which need not be the problems'.
    with torch.cuda.device_of(H):
        _minimize_kernel[(problems,)](
            H.contiguous(),
            lam.contiguous(),
            solutions,
            k,
            ridge,
            tolerance,
            to_boundary,
            iterations,
            size=size,
            num_warps=warps(size),
        )
    return solutions


def warps(size: int) -> int:
    """Return how many warps share a problem, so that it fits into their registers."""
    return max(1, size * size // 512)
