"""Ridge regression, regularised by leaving one out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.samples import Samples, energy

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
        weight: (..., d_u, d_v).
        residual: (..., N, d_v), the residuals of the samples it was fitted to.
        freedom: (..., N, 1), one minus each sample's leverage: what a residual's variance is of
            the noise's.
    """

    weight: Tensor
    residual: Tensor
    freedom: Tensor

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


def fit_ridge(samples: Samples, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Regularised as leaving one out asks for, and at least as the noise on u implies.

    Noise of variance t on every coordinate of u is, in the mean over its draws, a penalty of N t.
    On top of it two numbers are chosen: a penalty, and a factor in [0, 1] by which the weights are
    shrunk (Breiman 1996, stacked regressions).  They are those whose leave-one-out errors (PRESS,
    Allen 1974) have the smallest covariance determinant; the errors come from residuals and
    leverages, without refitting.

    Both are chosen on all samples.  A penalty that suits a few of them shrinks the weights of many
    for nothing: the error of the fit falls as 1 / N, and what it is worth to shrink falls with it.

    Args:
        samples: N of them, centred.
        penalties: those to try, over the total variance of u.

    Cost: N d_u min(N, d_u) for the Gram matrix, min(N, d_u)^3 and N d_u d_v for each penalty.
    """
    u, v = samples.u, samples.v
    own = samples.n * samples.noise_u + _least_penalty(u)
    gram = _gram(u)
    added = [penalty * energy(u) / samples.n for penalty in penalties]
    chosen = added[0] if len(added) == 1 else _chosen(u, v, gram, added, own)
    fit = _fit(u, v, gram, chosen + own)
    return _shrunk(fit, v, _scores(fit, v).argmin(-1))


def _chosen(u: Tensor, v: Tensor, gram: Tensor, added: Sequence[Tensor], own: Tensor) -> Tensor:
    """The best (..., 1, 1) of some penalties on top of the noise's, each at its best shrinkage.

    Beyond 512 samples in fewer dimensions by generalised cross-validation (Golub, Heath and Wahba
    1979): every leverage is taken to be their mean.
    """
    estimate = _fit if u.shape[-2] <= _OWN_LEVERAGE_UP_TO else _fit_at_mean_leverage
    best, chosen = u.new_full(added[0].shape, math.inf), added[0]
    # Not all at once, which would hold a factor of the Gram matrix for each.
    for penalty in added:
        score = _scores(estimate(u, v, gram, penalty + own), v).amin(-1)[..., None, None]
        # Kept on the device: each leading index has a penalty of its own.
        better = score < best
        best, chosen = torch.where(better, score, best), torch.where(better, penalty, chosen)
    return chosen


def _least_penalty(u: Tensor) -> Tensor:
    """(..., 1, 1): what the arithmetic resolves of the largest eigenvalue of a Gram matrix."""
    return 4 * torch.finfo(u.dtype).eps * energy(u)


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
    """The fit with its weights times ``index / 20``."""
    factor = (index.to(v.dtype) / (_SHRINKAGES - 1))[..., None, None]
    whole = 1 - 1 / v.shape[-2]
    return Ridge(
        factor * fit.weight,
        v - factor * (v - fit.residual),
        whole - factor * (whole - fit.freedom),
    )


def _is_primal(u: Tensor) -> bool:
    n, d = u.shape[-2:]
    return d < n


def _gram(u: Tensor) -> Tensor:
    """(..., d, d), or (..., N, N) where that is smaller: its lower triangle at least."""
    return u.mT @ u if _is_primal(u) else _outer_gram(u)


def _fit(u: Tensor, v: Tensor, gram: Tensor, penalty: Tensor) -> Ridge:
    """Centred u (..., N, d), v (..., N, r), penalty (..., 1, 1)."""
    penalty = penalty + torch.finfo(u.dtype).tiny
    return (_fit_primal if _is_primal(u) else _fit_dual)(u, v, gram, penalty)


def _fit_primal(u: Tensor, v: Tensor, gram: Tensor, penalty: Tensor) -> Ridge:
    factor = _cholesky(gram, penalty)
    half = torch.linalg.solve_triangular(factor, u.mT, upper=False)
    weight = torch.linalg.solve_triangular(factor.mT, half @ v, upper=True)
    leverage = torch.linalg.vector_norm(half, dim=-2).square().unsqueeze(-1)
    return Ridge(weight, v - u @ weight, _freedom(1 - leverage, u.shape[-2]))


def _fit_at_mean_leverage(u: Tensor, v: Tensor, gram: Tensor, penalty: Tensor) -> Ridge:
    """`_fit`, with the mean of the samples' leverages, (..., 1, 1), where that costs less."""
    if not _is_primal(u):
        return _fit(u, v, gram, penalty)
    n, d = u.shape[-2:]
    penalty = penalty + torch.finfo(u.dtype).tiny
    inverse = _inverse_factor(_cholesky(gram, penalty))
    weight = inverse.mT @ (inverse @ (u.mT @ v))
    left = (penalty * energy(inverse)).clamp(0, d)
    return Ridge(weight, v - u @ weight, _freedom(1 - (d - left) / n, n))


def _fit_dual(u: Tensor, v: Tensor, gram: Tensor, penalty: Tensor) -> Ridge:
    inverse = _inverse_factor(_cholesky(gram, penalty))
    dual = inverse.mT @ (inverse @ v)
    freedom = penalty * torch.linalg.vector_norm(inverse, dim=-2).square().unsqueeze(-1)
    return Ridge(u.mT @ dual, penalty * dual, _freedom(freedom, u.shape[-2]))


def _inverse_factor(factor: Tensor) -> Tensor:
    """Of a lower triangular matrix."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)


def _outer_gram(u: Tensor) -> Tensor:
    """``u u^T`` by its lower triangle of blocks: a factorisation reads no more of it."""
    half = u.shape[-2] // 2
    first, second = u[..., :half, :], u[..., half:, :]
    gram = u.new_zeros(*u.shape[:-1], u.shape[-2])
    gram[..., :half, :half] = first @ first.mT
    gram[..., half:, :half] = second @ first.mT
    gram[..., half:, half:] = second @ second.mT
    return gram


def _freedom(one_minus_leverage: Tensor, n: int) -> Tensor:
    """The mean of n samples took one more degree of freedom: 1/n of every sample's."""
    resolution = torch.finfo(one_minus_leverage.dtype).eps
    return (one_minus_leverage - 1 / n).clamp_min(resolution)


def _cholesky(gram: Tensor, penalty: Tensor) -> Tensor:
    size = gram.shape[-1]
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    # The _ex form: a check of the factorisation would wait for the device.
    return torch.linalg.cholesky_ex(gram + penalty * identity)[0]


def logdet(covariance: Tensor) -> Tensor:
    """(...,): log determinant of positive definite matrices (..., r, r)."""
    factor = torch.linalg.cholesky_ex(covariance)[0]
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def jitter(covariance: Tensor) -> Tensor:
    """What keeps a covariance positive definite in its arithmetic, times the identity."""
    r = covariance.shape[-1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    finfo = torch.finfo(covariance.dtype)
    identity = torch.eye(r, dtype=covariance.dtype, device=covariance.device)
    return (8 * finfo.eps * level + finfo.tiny) * identity
