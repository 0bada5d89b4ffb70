"""InfoNCE: a lower bound, by telling each sample's partner from the others'."""

from __future__ import annotations

import math

from torch import Tensor

from miub.estimators.conditional import LinearGaussian
from miub.estimators.crossfit import crossfitted
from miub.estimators.estimate import Estimate
from miub.estimators.samples import Samples


def infonce(u: Tensor, v: Tensor, *, noise: float = 0.0, seed: int = 0) -> Estimate:
    """``mean_i log q(v_i|u_i) - log mean_j q(v_i|u_j)`` nats, q fitted on the other half.

    A lower bound of I(u; v) in expectation whatever q is (van den Oord et al. 2018, arXiv
    1807.03748; Poole et al. 2019, arXiv 1905.06922), at most log n for the n held-out samples.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 16; without noise also
            at least 2 (d_v + 2).
        noise: tau: isotropic noise of tau times the mean variance of the coordinates, on both
            sides; drawn.
        seed: of the noise.

    Returns:
        Estimate: of shape (...); NaN where samples are not finite, 0 where u or v is constant.

    Raises:
        TypeError, ValueError: input that is not samples; see `crossfit.crossfitted`.

    Cost: two fits on N / 2 samples, and N^2 d_v / 2 for the pairs.
    """
    return crossfitted(u, v, _score, noise=noise, drawn_with=seed)


def _score(training: Samples, q: LinearGaussian, v: Tensor) -> tuple[Tensor, Tensor]:
    return contrast(q, v)


def contrast(q: LinearGaussian, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bound (...) and its terms (..., n), for v (..., n, d_v) outside of the fit."""
    pairs = q.scores(v)
    terms = pairs.diagonal(dim1=-2, dim2=-1) - pairs.logsumexp(-1) + math.log(v.shape[-2])
    return terms.mean(-1), terms
