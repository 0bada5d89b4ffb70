"""L1Out: a conditional against the mixture of the other samples' conditionals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miub.estimators.conditional import LinearGaussian
from miub.estimators.crossfit import crossfitted
from miub.estimators.estimate import Estimate, warns_of_heavy_tails
from miub.estimators.samples import Samples


@warns_of_heavy_tails
def l1out(u: Tensor, v: Tensor, *, noise: float = 0.0, seed: int = 0) -> Estimate:
    """``mean_i log q(v_i|u_i) - log mean_(j != i) q(v_i|u_j)`` nats, q fitted on the other half.

    An upper bound of I(u; v) in expectation if q is the true conditional (Poole et al. 2019, arXiv
    1905.06922, section 2.1).  It makes no assumption about the marginal, but with n held-out
    samples it is loose where I exceeds log n: the mixture then rarely has a component near v_i.

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
    n = v.shape[-2]
    pairs = q.log_density_pairs(v)
    own = torch.eye(n, dtype=torch.bool, device=v.device)
    others = pairs.masked_fill(own, -math.inf).logsumexp(-1) - math.log(n - 1)
    terms = q.log_density(v) - others
    return terms.mean(-1), terms
