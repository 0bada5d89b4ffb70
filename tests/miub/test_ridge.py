"""The fit beneath the estimators, against slow references."""

from __future__ import annotations

import pytest
import torch
from estimating import bracketed, design, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import normal

from miub.estimators.bracket import bracket, fit_bracket
from miub.estimators.design import design_by_columns, design_of
from miub.estimators.positive_definite import add_outer_product, cholesky, inverse_of_triangle
from miub.estimators.ridge import _fit, _fit_at_mean_leverage, fit_ridge
from miub.estimators.samples import prepare


def reference_ridge(u, v, penalty):
    """Weights and intercept by the normal equations."""
    mean_u, mean_v = u.mean(0), v.mean(0)
    a, b = u - mean_u, v - mean_v
    identity = torch.eye(u.shape[1], dtype=u.dtype)
    weight = torch.linalg.solve(a.T @ a + penalty * identity, a.T @ b)
    return weight, mean_v - mean_u @ weight


@settings(max_examples=25)
@given(n=st.integers(9, 24), d=st.integers(1, 30), r=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_fit_is_ridge_regression_and_its_left_out_errors_are_those_of_refitting(n, d, r, seed):
    u, v = pair(n, d, r, seed)
    samples = prepare(u, v, 0.05)
    ridge = fit_ridge(design_of(samples), penalties=(0.3,))
    found, fit = ridge.weight(samples.u), ridge.fit
    eps = 4 * torch.finfo(u.dtype).eps
    a = u - u.mean(0)
    penalty = (0.3 / n + eps) * a.square().sum() + n * samples.noise_u.item()
    weight, intercept = reference_ridge(u, v, penalty)
    size = weight.square().sum()
    shrinkage = ((found * weight).sum() / size).item()
    torch.testing.assert_close(found, shrinkage * weight, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(fit.squared_weight, found.T @ found, atol=1e-9, rtol=1e-7)
    assert round(shrinkage * 20) == pytest.approx(shrinkage * 20, abs=1e-6)
    fitted = v.mean(0) + shrinkage * (u @ weight + intercept - v.mean(0))
    torch.testing.assert_close(fit.residual, v - fitted, atol=1e-9, rtol=1e-7)
    # Without shrinkage and with the others' means: leaving one out by hand.
    hat = torch.linalg.solve(a.T @ a + penalty * torch.eye(d, dtype=u.dtype), a.T)
    leverage = (a * hat.T).sum(1)
    torch.testing.assert_close(
        fit.freedom[:, 0],
        (1 - 1 / n) - shrinkage * leverage,
        atol=1e-9,
        rtol=1e-7,
    )
    if shrinkage == 1:
        for i in (0, n - 1):
            kept = torch.arange(n) != i
            others_u, others_v = u[kept], v[kept]
            w = reference_penalised_about_own_mean(others_u, others_v, penalty)
            error = v[i] - (others_v.mean(0) + (u[i] - others_u.mean(0)) @ w)
            torch.testing.assert_close(fit.left_out_error[i], error, atol=1e-8, rtol=1e-6)


def reference_penalised_about_own_mean(u, v, penalty):
    return reference_ridge(u, v, penalty)[0]


def test_primal_and_dual_agree_where_samples_and_coordinates_are_about_as_many():
    u, v = pair(30, 29, 2)
    wide = torch.cat([u, torch.zeros(30, 2, dtype=u.dtype)], 1)
    narrow, dual = (fit_ridge(design(x, v), penalties=(0.1,)) for x in (u, wide))
    torch.testing.assert_close(narrow.fit.residual, dual.fit.residual, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(narrow.fit.freedom, dual.fit.freedom, atol=1e-8, rtol=1e-6)
    weight = dual.weight(prepare(wide, v, 0.0).u)
    torch.testing.assert_close(narrow.coefficients, weight[:29], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        narrow.fit.squared_weight, dual.fit.squared_weight, atol=1e-8, rtol=1e-6
    )


@pytest.mark.parametrize(("n", "d"), [(24, 24), (24, 300), (600, 700), (40, 9)])
def test_a_design_that_is_read_by_columns_is_the_one_of_whole_samples(n, d, monkeypatch):
    monkeypatch.setattr("miub.estimators.design._AT_ONCE", 100 * n)
    u, v = pair(n, d, 2)
    u = 3 + u
    read = []

    def columns(start, end):
        read.append(end - start)
        return u[:, start:end].clone()

    found, expected = design_by_columns(columns, d, v, 0.05), design(u, v, 0.05)
    assert sum(read) == d
    assert d < n or max(read) <= 100
    torch.testing.assert_close(found.gram.tril(), expected.gram.tril())
    assert (found.u is None) == (d >= n)
    torch.testing.assert_close(found.energy, expected.energy)
    for name, value in vars(expected.margins).items():
        torch.testing.assert_close(getattr(found.margins, name), value)


def test_fits_that_are_evaluated_together_are_those_alone():
    pairs = [design(*pair(40, d, 2, seed), noise=0.05) for seed, d in enumerate((3, 50, 7))]
    fits = [fit_bracket(samples, (0.0, 0.1)) for samples in pairs]
    upper, lower = bracket(fits)
    alone = [bracket([fit]) for fit in fits]
    torch.testing.assert_close(upper.value, torch.cat([one.value for one, _ in alone]))
    torch.testing.assert_close(upper.stderr, torch.cat([one.stderr for one, _ in alone]))
    torch.testing.assert_close(upper.heaviest, torch.cat([one.heaviest for one, _ in alone]))
    # The noise that is drawn for the lower bound is each fit's own.
    torch.testing.assert_close(
        lower.value, torch.cat([one.value for _, one in alone]), atol=0.2, rtol=0
    )


def test_a_constant_read_by_columns_shares_nothing():
    _, v = pair(24, 3, 2, dtype=torch.float32)
    constant = design_by_columns(lambda start, end: torch.full((24, end - start), 3.7), 40, v, 0.0)
    assert not constant.margins.informative
    assert bracketed(constant)[0].value == 0


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 513])
def test_triangles_are_inverted_and_grams_are_products(size):
    x = normal(0, 2, size, size + 3)
    gram = torch.zeros(2, size, size, dtype=x.dtype)
    for part in x.split(7, -1):
        add_outer_product(gram, part)
    torch.testing.assert_close(gram.tril(), (x @ x.mT).tril())
    penalty = torch.tensor([0.5, 2.0], dtype=x.dtype)[:, None, None]
    factor = cholesky(gram, penalty)
    identity = torch.eye(size, dtype=x.dtype)
    torch.testing.assert_close(factor @ factor.mT, x @ x.mT + penalty * identity)
    torch.testing.assert_close(inverse_of_triangle(factor) @ factor, identity.expand(2, -1, -1))


def test_the_mean_leverage_is_the_mean_of_the_leverages_and_the_fit_is_the_same():
    samples = design(*pair(60, 7, 2), 0.05)
    penalty = 3 * torch.ones(1, 1, dtype=samples.gram.dtype)
    own, mean = _fit(samples, penalty), _fit_at_mean_leverage(samples, penalty)
    torch.testing.assert_close(own.coefficients, mean.coefficients)
    torch.testing.assert_close(own.fit.residual, mean.fit.residual)
    torch.testing.assert_close(own.fit.freedom.mean(), mean.fit.freedom.squeeze())


@pytest.mark.parametrize("n", [512, 513, 4096])
def test_the_penalty_is_the_one_that_predicts_samples_that_were_left_out_best(n):
    """By refitting without a tenth at a time; the choice may be a neighbour where two are close."""
    u, v = pair(n, 100, 2)
    v = v + 8 * normal(5, n, 2)
    penalties = (0.0, 0.1, 1.0, 10.0, 1000.0)
    whole = fit_ridge(design(u, v), penalties)
    size = (u - u.mean(0)).square().sum() / n
    losses = []
    for penalty in penalties:
        error = []
        for out in torch.arange(n).chunk(10):
            kept = torch.ones(n, dtype=torch.bool)
            kept[out] = False
            weight, intercept = reference_ridge(u[kept], v[kept], penalty * size)
            error.append(v[out] - intercept - u[out] @ weight)
        losses.append(torch.logdet(torch.cov(torch.cat(error).T)).item())
    alone = [fit_ridge(design(u, v), (penalty,)) for penalty in penalties]
    distances = [(whole.fit.residual - one.fit.residual).norm().item() for one in alone]
    best = distances.index(min(distances))
    assert distances[best] < 1e-9
    assert abs(best - losses.index(min(losses))) <= 1


def test_with_many_samples_nothing_is_shrunk():
    u, v = pair(20_000, 20, 2)
    weight, _ = reference_ridge(u, v, 0.0)
    found = fit_ridge(design(u, v)).coefficients
    assert (found - weight).norm() < 0.01 * weight.norm()
