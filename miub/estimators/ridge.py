"""Ridge regression, regularised by leaving one out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.design import Design
from miub.estimators.positive_definite import cholesky, inverse_of_triangle, jitter, logdet
from miub.estimators.samples import energy

# Penalties that are tried, over the total variance of u.  The first leaves the noise model's own.
PENALTIES = (0.0, 1e-3, 1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5, 10.0, 100.0)
_SHRINKAGES = 21  # factors that are tried, from 0 to 1
# With more samples penalties are compared at the mean leverage: each sample's own takes a pass over
# all samples for each penalty.
_OWN_LEVERAGE_UP_TO = 512


@dataclass(frozen=True)
class Ridge:
    """Ridge regression of v on u, both centred.

    Attributes:
        coefficients: the weights (..., d_u, d_v) where d_u < N; else (..., N, d_v), whose products
            with the samples, ``u^T coefficients``, are the weights.
        squared_weight: (..., d_v, d_v), ``W^T W`` of the weights.
        residual: (..., N, d_v), the residuals of the samples it was fitted to.
        freedom: (..., N, 1), one minus each sample's leverage: the variance of its residual over
            that of the noise.
    """

    coefficients: Tensor
    squared_weight: Tensor
    residual: Tensor
    freedom: Tensor

    def weight(self, u: Tensor) -> Tensor:
        """Return the weights (..., d_u, d_v), given the samples (..., N, d_u) of the fit."""
        n, d = u.shape[-2:]
        return self.coefficients if d < n else u.mT @ self.coefficients

    @property
    def unbiased_residual(self) -> Tensor:
        """(..., N, d_v): residuals whose second moment is that of v given u.

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
        """(..., N, d_v): each sample's error under the fit to all others."""
        return self.residual / self.freedom


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
    own = design.n * design.noise_u + _least_penalty(design)
    added = [penalty * design.energy / design.n for penalty in penalties]
    chosen = added[0] if len(added) == 1 else _chosen(design, added, own)
    fit = _fit(design, chosen + own)
    return _shrunk(fit, design.v, _scores(fit, design.v).argmin(-1))


def _chosen(design: Design, added: Sequence[Tensor], own: Tensor) -> Tensor:
    """Return the best (..., 1, 1) of some penalties on top of the noise's.

    Each is judged at its best shrinkage.  Beyond 512 samples in fewer dimensions by generalised
    cross-validation (Golub, Heath and Wahba 1979): every leverage is taken to be their mean.
    """
    estimate = _fit if design.n <= _OWN_LEVERAGE_UP_TO else _fit_at_mean_leverage
    best, chosen = design.v.new_full(added[0].shape, math.inf), added[0]
    # Not all at once, which would hold a factor of the Gram matrix for each.
    for penalty in added:
        score = _scores(estimate(design, penalty + own), design.v).amin(-1)[..., None, None]
        # Kept on the device: each leading index has a penalty of its own.
        better = score < best
        best, chosen = torch.where(better, score, best), torch.where(better, penalty, chosen)
    return chosen


def _least_penalty(design: Design) -> Tensor:
    """(..., 1, 1): the arithmetic's resolution of the largest eigenvalue of a Gram matrix."""
    finfo = torch.finfo(design.gram.dtype)
    return 4 * finfo.eps * design.energy + finfo.tiny


def _scores(fit: Ridge, v: Tensor) -> Tensor:
    """(..., shrinkages): log determinant of the leave-one-out errors' covariance.

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


def _shrunk(fit: Ridge, v: Tensor, index: Tensor) -> Ridge:
    """Return the fit with its weights times ``index / 20``."""
    factor = (index.to(v.dtype) / (_SHRINKAGES - 1))[..., None, None]
    whole = 1 - 1 / v.shape[-2]
    return Ridge(
        factor * fit.coefficients,
        factor.square() * fit.squared_weight,
        v - factor * (v - fit.residual),
        whole - factor * (whole - fit.freedom),
    )


def _fit(design: Design, penalty: Tensor) -> Ridge:
    """Return the fit at one penalty (..., 1, 1), with the leverage of each sample."""
    v = design.v
    factor = cholesky(design.gram, penalty)
    if design.u is None:
        return _dual(v, inverse_of_triangle(factor), penalty)
    # From the right: the same numbers as the left-hand solve of u^T, in half the time.
    half = torch.linalg.solve_triangular(factor.mT, design.u, upper=True, left=False)
    weight = torch.linalg.solve_triangular(factor.mT, half.mT @ v, upper=True)
    leverage = torch.linalg.vector_norm(half, dim=-1, keepdim=True).square()
    freedom = _freedom(1 - leverage, design.n)
    return Ridge(weight, weight.mT @ weight, v - design.u @ weight, freedom)


def _fit_at_mean_leverage(design: Design, penalty: Tensor) -> Ridge:
    """Return `_fit` with the mean of the samples' leverages, (..., 1, 1), where it costs less."""
    if design.u is None:
        return _fit(design, penalty)
    u, v = design.u, design.v
    inverse = inverse_of_triangle(cholesky(design.gram, penalty))
    weight = inverse.mT @ (inverse @ (u.mT @ v))
    left = (penalty * energy(inverse)).clamp(0, u.shape[-1])
    freedom = _freedom(1 - (u.shape[-1] - left) / design.n, design.n)
    return Ridge(weight, weight.mT @ weight, v - u @ weight, freedom)


def _dual(v: Tensor, inverse: Tensor, penalty: Tensor) -> Ridge:
    """Return the fit by the inverse (..., N, N) of the factor of ``u u^T + penalty I``."""
    dual = inverse.mT @ (inverse @ v)
    residual = penalty * dual
    squared_weight = dual.mT @ (v - residual)
    freedom = penalty * torch.linalg.vector_norm(inverse, dim=-2).square().unsqueeze(-1)
    return Ridge(
        dual,
        (squared_weight + squared_weight.mT) / 2,
        residual,
        _freedom(freedom, v.shape[-2]),
    )


def _freedom(one_minus_leverage: Tensor, n: int) -> Tensor:
    """Return it less 1/n, each sample's share of the degree of freedom that their mean took."""
    resolution = torch.finfo(one_minus_leverage.dtype).eps
    return (one_minus_leverage - 1 / n).clamp_min(resolution)
