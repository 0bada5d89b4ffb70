"""CLUB: a contrastive log-ratio upper bound."""

from __future__ import annotations

from torch import Tensor

from miub.estimators.conditional import LinearGaussian
from miub.estimators.crossfit import crossfitted
from miub.estimators.estimate import Estimate, warns_of_heavy_tails
from miub.estimators.samples import Samples


@warns_of_heavy_tails
def club(u: Tensor, v: Tensor, *, noise: float = 0.0) -> Estimate:
    """``E_p(u,v) log q(v|u) - E_p(u)p(v) log q(v|u)`` nats, q fitted on the other half.

    An upper bound of I(u; v) if q is the true conditional, or closer (in KL divergence) to the
    joint distribution than to the product of the marginals in the sense of Theorem 3.2 of Cheng et
    al. 2020 (arXiv 2006.12013).  With a linear-Gaussian q and its population regression it is
    ``sum rho_i^2 / (1 - rho_i^2)`` of the canonical correlations: at least the Gaussian mutual
    information, and exponential in it, so loose where there is much of it.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 16; without noise also
            at least 2 (d_v + 2).
        noise: tau: isotropic noise of tau times the mean variance of the coordinates, on both
            sides.  It moves both terms alike, so it enters through q alone.

    Returns:
        Estimate: of shape (...); NaN where samples are not finite, 0 where u or v is constant.

    Raises:
        TypeError, ValueError: input that is not samples; see `crossfit.crossfitted`.

    Cost: two fits on N / 2 samples, and N^2 d_v / 2 for the pairs.
    """
    return crossfitted(u, v, _score, noise=noise)


def _score(training: Samples, q: LinearGaussian, v: Tensor) -> tuple[Tensor, Tensor]:
    n = v.shape[-2]
    pairs = q.log_density_pairs(v)
    joint = q.log_density(v)
    # Sample i against every other one, in either role.
    apart = (pairs.sum(-1) + pairs.sum(-2) - 2 * pairs.diagonal(dim1=-2, dim2=-1)) / (2 * (n - 1))
    terms = joint - apart
    return terms.mean(-1), joint - 2 * apart
