"""An upper and a lower bound from one regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miub.estimators.conditional import LinearGaussian, draw, moved_by_noise
from miub.estimators.estimate import Estimate, estimate_of
from miub.estimators.infonce import contrast
from miub.estimators.regression import Regression, regress
from miub.estimators.ridge import PENALTIES
from miub.estimators.samples import full_precision, prepare
from miub.estimators.tempered import tempered_moments

# The pairs of more samples would cost more than the regression; the bound is at most their log.
_CONTRAST_ON = 256


@torch.no_grad()
def bracket(
    u: Tensor,
    v: Tensor,
    *,
    noise: float = 0.0,
    order: float = 0.5,
    penalties: Sequence[float] = PENALTIES,
    generator: torch.Generator | None = None,
    overwrite: bool = False,
) -> tuple[Estimate, Estimate]:
    """`tempered`, and an InfoNCE bound that needs no second fit.

    The critic of the latter is the regression that leaves the sample out, which follows from
    residuals and leverages.  The other samples' predictions have seen v_i, which can only make it
    look more like theirs: the bound is lower for it, not higher.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 8.
        noise: tau, on both sides.
        order: of `tempered`.
        penalties: of `tempered`.
        generator: draws the noise for the lower bound, on the samples' device; None: seed 0.
        overwrite: centre the samples where they lie, to save their size in memory.

    Returns:
        The upper and the lower bound.

    Raises:
        TypeError, ValueError: as `tempered` does.
    """
    with full_precision():
        regression = regress(prepare(u, v, noise, overwrite=overwrite), penalties)
        if generator is None:
            generator = torch.Generator(u.device).manual_seed(0)
        return tempered_moments(regression, order), _left_out_contrast(regression, generator)


def _left_out_contrast(regression: Regression, generator: torch.Generator) -> Estimate:
    samples = regression.samples
    error = regression.ridge.left_out_error
    covariance = error.mT @ error / samples.n + regression.carried + regression.least
    part = samples.part(0, min(samples.n, _CONTRAST_ON))
    means = part.v - error[..., : part.n, :]
    means = moved_by_noise(means, regression.carried, generator)
    noisy = part.v + samples.noise_v.sqrt() * draw(part.v.shape, generator, part.v)
    q = LinearGaussian(means, covariance, torch.zeros_like(covariance))
    value, terms = contrast(q, noisy)
    stderr = terms.std(-1) / part.n**0.5
    return estimate_of(samples, value, stderr, part.n)
