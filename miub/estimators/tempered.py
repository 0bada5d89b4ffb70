"""Bounds from the moments of one regression: between the Gaussian value and CLUB's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miub.estimators.design import design_of
from miub.estimators.estimate import Estimate, estimate_of, warns_of_heavy_tails
from miub.estimators.positive_definite import logdet
from miub.estimators.regression import Regression, regress
from miub.estimators.ridge import PENALTIES
from miub.estimators.samples import full_precision, prepare


@warns_of_heavy_tails
@torch.no_grad()
def tempered(
    u: Tensor,
    v: Tensor,
    *,
    noise: float = 0.0,
    order: float = 0.5,
    penalties: Sequence[float] = PENALTIES,
) -> Estimate:
    """``E_p(u,v) log q(v|u) - 1/a E_p(v) log E_p(u) q(v|u)^a`` nats for a linear-Gaussian q.

    The order a leads from CLUB (a -> 0) to the Gaussian value (a = 1), and the bound falls on the
    way: ``(E q^a)^(1/a)`` rises with a (power means).  With the covariances S of v and R of v given
    u, and the u of the inner mean Gaussian, it is

        1/(2a) log det((1 - a) I + a R^-1 S) + 1/2 tr(((1 - a) R + a S)^-1 S) - d_v / 2,

    the sum over canonical correlations of ``1/(2a) log(1 + a x) + 1/2 (1 + x)/(1 + a x) - 1/2``
    with ``x = rho^2 / (1 - rho^2)``.  Jointly Gaussian samples: at least I(u; v), at most about
    I / a, and 0 where I is 0.  Any others: I plus the slack over the Gaussian value, plus the
    negentropy of v, minus the negentropy of v given u (and what of the dependence is not linear);
    so where it falls short for a = 1, a smaller order still bounds.

    R comes from a ridge regression of v on u on all samples, whose residuals are made unbiased by
    their leverages (`ridge.Ridge.covariance`): no samples need to be held out.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 8.
        noise: tau: isotropic noise of tau times the mean variance of the coordinates, on both
            sides; analytic.
        order: a, in (0, 1].
        penalties: what the ridge may add, over the total variance of u; the choice is by leaving
            one out.  A single 0.0 costs least and leaves the choice to the shrinkage of the
            weights alone.

    Returns:
        Estimate: of shape (...); NaN where samples are not finite, 0 where u or v is constant.  The
        standard error is from the estimate's influence function at the chosen penalty.

    Raises:
        TypeError, ValueError: an order out of range; input that is not samples, see
            `samples.prepare`.

    Cost: N d_u min(N, d_u), and min(N, d_u)^3 + N d_u d_v for each penalty; up to 512 samples
        N d_u^2 for each penalty where d_u < N.
    """
    with full_precision():
        return tempered_moments(regress(design_of(prepare(u, v, noise)), penalties), order)


def tempered_moments(regression: Regression, order: float) -> Estimate:
    """Return `tempered` from the moments of a regression."""
    if not 0 < order <= 1:
        raise ValueError(f"order must be in (0, 1], got {order}.")
    margins, S, R = regression.margins, regression.covariance, regression.conditional
    mixed = (1 - order) * R + order * S
    inverse = torch.linalg.inv_ex(mixed)[0]
    trace = (inverse * S).sum((-2, -1))
    value = (logdet(mixed) - logdet(R)) / (2 * order) + (trace - S.shape[-1]) / 2
    # The value's derivatives with respect to S and R, along each sample's part in them.
    by_mixed = inverse / (2 * order) - inverse @ S @ inverse / 2
    by_R = (1 - order) * by_mixed - torch.linalg.inv_ex(R)[0] / (2 * order)
    by_S = order * by_mixed + inverse / 2
    v, residual = margins.v, regression.fit.unbiased_residual
    influence = ((v @ by_S) * v).sum(-1) + ((residual @ by_R) * residual).sum(-1)
    stderr = influence.std(-1) / margins.n**0.5
    return estimate_of(margins, value, stderr, margins.n)


@warns_of_heavy_tails
@torch.no_grad()
def gaussian(
    u: Tensor, v: Tensor, *, noise: float = 0.0, penalties: Sequence[float] = PENALTIES
) -> Estimate:
    """``-1/2 sum log(1 - rho_i^2)`` nats, rho the canonical correlations: `tempered` of order 1.

    Equal to I(u; v) where u and v are jointly Gaussian.  In general it is ``I + J(v) - J(v|u)``,
    where J is the negentropy, the divergence of a distribution from the Gaussian with its mean and
    covariance: an upper bound as long as v is at least as far from Gaussian as v given u, and the
    dependence is linear.

    Arguments, result, errors and cost as for `tempered`.
    """
    with full_precision():
        return tempered_moments(regress(design_of(prepare(u, v, noise)), penalties), 1.0)
