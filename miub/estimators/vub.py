"""VUB: the divergence of a conditional from a fixed marginal."""

from __future__ import annotations

from torch import Tensor

from miub.estimators.conditional import LinearGaussian
from miub.estimators.crossfit import crossfitted
from miub.estimators.estimate import Estimate, warns_of_heavy_tails
from miub.estimators.positive_definite import squared_lengths
from miub.estimators.regression import spread
from miub.estimators.samples import Samples


@warns_of_heavy_tails
def vub(u: Tensor, v: Tensor, *, noise: float = 0.0) -> Estimate:
    """``E_p(u) KL(q(v|u) || r(v))`` nats, q and the Gaussian r fitted on the other half.

    With the true conditional for q it is ``I + KL(p(v) || r)``, an upper bound of I(u; v) for any r
    (Alemi et al. 2017, arXiv 1612.00410; Poole et al. 2019, arXiv 1905.06922).  With a fitted q it
    is one as far as q is right about p(v|u).  For jointly Gaussian u and v it equals I.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 16; without noise also
            at least 2 (d_v + 2).
        noise: tau: isotropic noise of tau times the mean variance of the coordinates, on both
            sides; analytic.

    Returns:
        Estimate: of shape (...); NaN where samples are not finite, 0 where u or v is constant.  The
        standard error is that of the mean of ``log q(v|u) / r(v)``, which the value estimates.

    Raises:
        TypeError, ValueError: input that is not samples; see `crossfit.crossfitted`.

    Cost: two fits on N / 2 samples.
    """
    return crossfitted(u, v, _score, noise=noise)


def _score(training: Samples, q: LinearGaussian, v: Tensor) -> tuple[Tensor, Tensor]:
    mean, marginal = spread(training)
    return q.divergence(mean, marginal).mean(-1), q.log_density(v) + squared_lengths(
        v - mean, marginal
    ) / 2
