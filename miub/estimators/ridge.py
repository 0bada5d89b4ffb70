"""Ridge regression, regularised by leaving one out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.design import Design
from miub.estimators.positive_definite import cholesky, inverse_of_triangle, jitter, logdet

# Penalties that are tried, over the total variance of u.  The first leaves the noise model's own.
PENALTIES = (0.0, 1e-3, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5, 10.0, 100.0)
_SHRINKAGES = 21  # factors that are tried, from 0 to 1
# With more samples penalties are compared at the mean leverage: each sample's own takes a pass over
# all samples for each penalty.
_OWN_LEVERAGE_UP_TO = 512


@dataclass(frozen=True)
class Fit:
    """A ridge regression of v on u, both centred, as its samples see it.

    Attributes:
        squared_weight: (..., d_v, d_v), ``W^T W`` of the weights.
        residual: (..., N, d_v), the residuals of the samples it was fitted to.
        freedom: (..., N, 1), one minus each sample's leverage: the variance of its residual over
            that of the noise.
    """

    squared_weight: Tensor
    residual: Tensor
    freedom: Tensor

    @property
    def unbiased_residual(self) -> Tensor:
        """Residuals (..., N, d_v) whose second moment is that of v given u.

        Divided by the root of one minus their leverages (MacKinnon and White 1985, HC2): in-sample
        residuals are too small by that factor, leave-one-out errors too large.  It is unbiased for
        a linear dependence with equal variances.  For a Gaussian process with this kernel it is the
        noise variance that maximises the leave-one-out predictive density at the given ratio of
        penalty to noise (Rasmussen and Williams 2006, section 5.4.2), so it stays right where there
        are more coordinates than samples.
        """
        return self.residual * self.freedom.rsqrt()

    @property
    def left_out_error(self) -> Tensor:
        """Each sample's error under the fit to all others, (..., N, d_v)."""
        return self.residual / self.freedom

    def shrunk(self, factor: Tensor, v: Tensor) -> Fit:
        """Return the fit with its weights times a factor (..., 1, 1)."""
        whole = 1 - 1 / v.shape[-2]
        return Fit(
            factor.square() * self.squared_weight,
            v - factor * (v - self.residual),
            whole - factor * (whole - self.freedom),
        )


@dataclass(frozen=True)
class Ridge:
    """A fit, with its weights.

    Attributes:
        coefficients: the weights (..., d_u, d_v) where d_u < N; else (..., N, d_v), whose products
            with the samples, ``u^T coefficients``, are the weights.
        fit: as its samples see it.
    """

    coefficients: Tensor
    fit: Fit

    def weight(self, u: Tensor) -> Tensor:
        """Return the weights (..., d_u, d_v), given the samples (..., N, d_u) of the fit."""
        n, d = u.shape[-2:]
        return self.coefficients if d < n else u.mT @ self.coefficients


def fit_ridge(design: Design, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Fit with the regularisation that leaving one out chooses, at least what noise on u implies.

    Noise of variance t on every coordinate of u is, in the mean over its draws, a penalty of N t.
    On top of it two numbers are chosen: a penalty, and a factor in [0, 1] by which the weights are
    shrunk (Breiman 1996, stacked regressions).  They are those whose leave-one-out errors (PRESS,
    Allen 1974) have the smallest covariance determinant; the errors come from residuals and
    leverages, without refitting.

    Both are chosen on all samples.  A penalty that suits a few of them shrinks the weights of many
    for nothing: the error of the fit falls as 1 / N, and the gain from shrinking falls with it.

    Args:
        design: of N samples.
        penalties: those to try, over the total variance of u.

    Cost: for each penalty min(N, d_u)^3 / 3, and N d_u^2 / 2 where d_u < N.
    """
    ridge, v = fit_penalised(design, penalties), design.margins.v
    factor = best_shrinkage(ridge.fit, v)
    return Ridge(factor * ridge.coefficients, ridge.fit.shrunk(factor, v))


def fit_penalised(design: Design, penalties: Sequence[float]) -> Ridge:
    """Return `fit_ridge` with its penalty, before its weights are shrunk."""
    margins = design.margins
    own = margins.n * margins.noise_u + _least_penalty(design)
    unit = design.energy / margins.n
    tried = [penalty * unit + own for penalty in penalties]
    return _fit(design, tried[0]) if len(tried) == 1 else _best_fit(design, tried)


def best_shrinkage(fit: Fit, v: Tensor) -> Tensor:
    """Return the factor (..., 1, 1) in [0, 1] for the weights that leaving one out chooses."""
    return (_scores(fit, v).argmin(-1).to(v.dtype) / (_SHRINKAGES - 1))[..., None, None]


def _best_fit(design: Design, penalties: Sequence[Tensor]) -> Ridge:
    """Return the fit at the best of some penalties (..., 1, 1), before its weights are shrunk.

    Each is judged at its best shrinkage.  Beyond 512 samples in fewer dimensions by generalised
    cross-validation (Golub, Heath and Wahba 1979): every leverage is taken to be their mean.
    """
    v = design.margins.v
    own_leverage = v.shape[-2] <= _OWN_LEVERAGE_UP_TO
    estimate = _fit if own_leverage else _fit_at_mean_leverage
    # One after the other: a factor of the Gram matrix for each would be held otherwise.
    ridges = [estimate(design, penalty) for penalty in penalties]
    fits = Fit(*_stacked([vars(ridge.fit).values() for ridge in ridges]))
    scores = _scores(fits, v).amin(-1)
    # A score that is not a number is never the best.
    best = scores.nan_to_num(math.inf, math.inf, -math.inf).argmin(0, keepdim=True)
    # Kept on the device: each leading index has a penalty of its own.
    best = best[..., None, None]
    if not own_leverage:
        return _fit(design, torch.stack(list(penalties)).take_along_dim(best, 0)[0])
    [coefficients] = _stacked([[ridge.coefficients] for ridge in ridges])
    chosen = [x.take_along_dim(best, 0)[0] for x in (coefficients, *vars(fits).values())]
    return Ridge(chosen[0], Fit(*chosen[1:]))


def _stacked(parts: Sequence[Iterable[Tensor]]) -> list[Tensor]:
    """Return, of several lists of tensors alike, each tensor stacked along a new first axis."""
    return [torch.stack(alike) for alike in zip(*parts, strict=True)]


def _least_penalty(design: Design) -> Tensor:
    """Return the arithmetic's resolution of a Gram matrix's largest eigenvalue, (..., 1, 1)."""
    finfo = torch.finfo(design.gram.dtype)
    return 4 * finfo.eps * design.energy + finfo.tiny


def _scores(fit: Fit, v: Tensor) -> Tensor:
    """Return (..., shrinkages): log determinant of the leave-one-out errors' covariance.

    It is taken together with d_v / N of v's own: with few samples for its dimension a sample
    covariance is nearly singular by chance, and the chance would decide.
    """
    n, r = v.shape[-2:]
    prediction = v - fit.left_out_error
    spread, crossed = v.mT @ v / n, v.mT @ prediction / n
    crossed = (crossed + crossed.mT).unsqueeze(-3)
    predicted = (prediction.mT @ prediction / n).unsqueeze(-3)
    factors = torch.linspace(0, 1, _SHRINKAGES, dtype=v.dtype, device=v.device)[:, None, None]
    error = spread.unsqueeze(-3) - factors * crossed + factors.square() * predicted
    return logdet(error + (r / n * spread + jitter(spread)).unsqueeze(-3))


def _fit(design: Design, penalty: Tensor) -> Ridge:
    """Return the fit at one penalty (..., 1, 1), with the leverage of each sample."""
    v = design.margins.v
    factor = cholesky(design.gram, penalty)
    if design.u is None:
        return _dual(v, inverse_of_triangle(factor), penalty)
    # From the right: the same numbers as the left-hand solve of u^T, in half the time.
    half = torch.linalg.solve_triangular(factor.mT, design.u, upper=True, left=False)
    # Its columns are contiguous: products and sums along them are several times as fast.
    weight = torch.linalg.solve_triangular(factor.mT, (v.mT @ half).mT, upper=True)
    freedom = _freedom(1 - half.square_().sum(-1, keepdim=True), v.shape[-2])
    return Ridge(weight, Fit(weight.mT @ weight, _residual(v, design.u, weight), freedom))


def _fit_at_mean_leverage(design: Design, penalty: Tensor) -> Ridge:
    """Return `_fit` with the mean of the samples' leverages, (..., 1, 1), where it costs less."""
    if design.u is None:
        return _fit(design, penalty)
    u, v = design.u, design.margins.v
    n, d = u.shape[-2:]
    inverse = inverse_of_triangle(cholesky(design.gram, penalty))
    weight = inverse.mT @ (inverse @ (u.mT @ v))
    energy = torch.linalg.vector_norm(inverse, dim=(-2, -1), keepdim=True).square()
    freedom = _freedom(1 - (d - (penalty * energy).clamp(0, d)) / n, n)
    return Ridge(weight, Fit(weight.mT @ weight, _residual(v, u, weight), freedom))


def _residual(v: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    return v - (weight.mT @ u.mT).mT


def _dual(v: Tensor, inverse: Tensor, penalty: Tensor) -> Ridge:
    """Return the fit by the inverse (..., N, N) of the factor of ``u u^T + penalty I``."""
    dual = ((v.mT @ inverse.mT) @ inverse).mT
    residual = penalty * dual
    squared_weight = dual.mT @ (v - residual)
    freedom = penalty * inverse.square_().sum(-2).unsqueeze(-1)
    fit = Fit((squared_weight + squared_weight.mT) / 2, residual, _freedom(freedom, v.shape[-2]))
    return Ridge(dual, fit)


def _freedom(one_minus_leverage: Tensor, n: int) -> Tensor:
    """Return it less 1/n, each sample's share of the degree of freedom that their mean took."""
    resolution = torch.finfo(one_minus_leverage.dtype).eps
    return (one_minus_leverage - 1 / n).clamp_min(resolution)
