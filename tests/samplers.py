"""Matrices by rank, shape and the place of their columns, for what must hold of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

SIDES = st.integers(1, 9)  # of a weight: below, at and above the ranks
RANKS = st.integers(1, 6)
SEEDS = st.integers(0, 2**20)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 2)])  # layers before the matrix


def normal(seed: int | torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    if isinstance(seed, int):
        seed = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=seed, dtype=dtype)


def _first_zero(matrix: Tensor) -> Tensor:
    matrix[..., 0] = 0
    return matrix


def _last_as_first(matrix: Tensor) -> Tensor:
    matrix[..., -1] = matrix[..., 0]
    return matrix


def _last_opposite(matrix: Tensor) -> Tensor:
    matrix[..., -1] = -matrix[..., 0]
    return matrix


# How the columns of a matrix (..., rows, columns) lie: each makes them so of any, in place or not.
COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "generic": lambda matrix: matrix,
    "dead column": _first_zero,
    "duplicated columns": _last_as_first,
    "opposite columns": _last_opposite,
    "nearly parallel": lambda matrix: matrix[..., :1] + 1e-3 * matrix,
}
