from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import COLUMNS, SEEDS, normal
from scipy.optimize import nnls
from torch import Tensor

from scalora.scaling.nonnegative import minimize_nonnegative

# A problem is |b - A x|^2 over x >= 0: H = A^T A is positive semidefinite, lambda = A^T b in its
# range.  A has fewer rows than columns where H shall be singular.
KINDS = [*COLUMNS, "non-negative"]


def _least_squares(seed: int, kind: str, rows: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, b = normal(generator, rows, k), normal(generator, rows)
    return (COLUMNS[kind](A), b) if kind in COLUMNS else (A.abs(), b.abs())


problems = st.builds(
    _least_squares,
    SEEDS,
    st.sampled_from(KINDS),
    rows=st.integers(1, 20),
    k=st.integers(1, 16),
)


def _normal_equations(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return A.mT @ A, (A.mT @ b.unsqueeze(-1)).squeeze(-1)


def _residual(A: Tensor, b: Tensor, x: Tensor) -> float:
    return float((b - A @ x).square().sum())


@given(problems)
@settings(max_examples=200)
def test_reaches_the_residual_of_scipys_nnls(problem: tuple[Tensor, Tensor]) -> None:
    A, b = problem
    x = minimize_nonnegative(*_normal_equations(A, b))
    expected, _ = nnls(A.numpy(), b.numpy(), maxiter=10_000)
    assert torch.all(x >= 0)
    best = _residual(A, b, torch.from_numpy(expected))
    assert _residual(A, b, x) <= best + 1e-9 * float(b.square().sum())


@given(problems)
@settings(max_examples=100)
def test_satisfies_the_optimality_conditions(problem: tuple[Tensor, Tensor]) -> None:
    A, b = problem
    x = minimize_nonnegative(*_normal_equations(A, b))
    lengths, size = A.norm(dim=0), b.norm()
    slope = -(A.mT @ (b - A @ x)) / (lengths * size).clamp_min(1e-300)  # cosines
    assert torch.all(slope >= -1e-5)  # no coordinate wants to grow
    assert torch.all((slope * x * lengths / size).abs() <= 1e-5)  # nor a positive one to shrink


@given(st.lists(problems, min_size=2, max_size=5))
@settings(max_examples=50)
def test_every_problem_of_a_batch_is_solved_as_if_alone(
    problems_: list[tuple[Tensor, Tensor]],
) -> None:
    # Some converge long before others: they must not move any more.
    k = max(A.shape[1] for A, _ in problems_)
    H, lam = (
        torch.zeros(len(problems_), k, k, dtype=torch.float64),
        torch.zeros(len(problems_), k, dtype=torch.float64),
    )
    for i, (A, b) in enumerate(problems_):
        width = A.shape[1]
        H[i, :width, :width], lam[i, :width] = _normal_equations(A, b)
    together = minimize_nonnegative(H, lam)
    for i, (A, b) in enumerate(problems_):
        alone = minimize_nonnegative(H[i], lam[i])
        width = A.shape[1]
        difference = _residual(A, b, together[i, :width]) - _residual(A, b, alone[:width])
        assert abs(difference) <= 1e-9 * float(b.square().sum())


@given(problems, st.sampled_from([1e-30, 1e-3, 1e20]), st.sampled_from([1e-12, 1e15]))
@settings(max_examples=50)
def test_units_do_not_matter(
    problem: tuple[Tensor, Tensor], unit_of_b: float, unit_of_a: float
) -> None:
    A, b = problem
    k = A.shape[1]
    units = torch.ones(k, dtype=torch.float64)
    units[: k // 2] = unit_of_a
    x = minimize_nonnegative(*_normal_equations(A * units, b * unit_of_b))
    x_in_old_units = x * units / unit_of_b
    expected, _ = nnls(A.numpy(), b.numpy(), maxiter=10_000)
    best = _residual(A, b, torch.from_numpy(expected))
    assert _residual(A, b, x_in_old_units) <= best + 1e-9 * float(b.square().sum())


def test_orthogonal_columns_are_solved_one_by_one() -> None:
    diagonal = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)
    lam = torch.tensor([3.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    x = minimize_nonnegative(torch.diag(diagonal), lam)
    torch.testing.assert_close(
        x, torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64), rtol=1e-12, atol=1e-7
    )


def test_nothing_to_gain_gives_zero() -> None:
    A, _ = _least_squares(0, "generic", rows=9, k=5)
    H = A.mT @ A
    for lam in (torch.zeros(5, dtype=torch.float64), -torch.ones(5, dtype=torch.float64)):
        assert torch.all(minimize_nonnegative(H, lam) <= 1e-7)


def test_coordinates_without_curvature_stay_at_zero() -> None:
    A, b = _least_squares(1, "dead column", rows=9, k=5)
    H, lam = _normal_equations(A, b)
    assert minimize_nonnegative(H, lam)[0] == 0
    assert torch.all(minimize_nonnegative(torch.zeros_like(H), torch.zeros_like(lam)) == 0)


def test_an_unconstrained_optimum_that_is_feasible_is_returned_to_round_off() -> None:
    A, _ = _least_squares(2, "generic", rows=20, k=6)
    expected = torch.arange(1.0, 7.0, dtype=torch.float64)
    H = A.mT @ A
    torch.testing.assert_close(minimize_nonnegative(H, H @ expected), expected, rtol=1e-11, atol=0)


def test_an_optimum_where_price_and_amount_both_vanish_is_found() -> None:
    # x_j = 0 and (H x - lambda)_j = 0 at once: interior-point methods are slow there.
    A, _ = _least_squares(3, "generic", rows=20, k=6)
    expected = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    H = A.mT @ A
    torch.testing.assert_close(
        minimize_nonnegative(H, H @ expected), expected, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_float32_suffices_where_a_device_has_no_more(kind: str) -> None:
    worst = 0.0
    for seed in range(30):
        A, b = _least_squares(seed, kind, rows=30, k=16)
        H, lam = _normal_equations(A, b)
        x = minimize_nonnegative(H.float(), lam.float())
        assert x.dtype == torch.float32 and torch.all(x >= 0)
        expected, _ = nnls(A.numpy(), b.numpy())
        best = _residual(A, b, torch.from_numpy(expected))
        worst = max(worst, (_residual(A, b, x.double()) - best) / float(b.square().sum()))
    assert worst < 1e-2 if kind == "nearly parallel" else worst < 1e-3


def test_many_problems_of_lora_size_are_solved_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(7, 32, 40, 16, generator=generator, dtype=torch.float64)
    b = torch.randn(7, 32, 40, generator=generator, dtype=torch.float64)
    x = minimize_nonnegative(*_normal_equations(A, b))
    assert x.shape == (7, 32, 16)
    for i, j in np.ndindex(7, 32):
        expected, _ = nnls(A[i, j].numpy(), b[i, j].numpy())
        np.testing.assert_allclose(x[i, j], expected, rtol=1e-7, atol=1e-7)
