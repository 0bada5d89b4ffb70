"""An upper and a lower bound from one regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from miub.estimators.conditional import LinearGaussian, moved_by_noise, standard_normal
from miub.estimators.design import Design
from miub.estimators.estimate import Estimate, estimate_of
from miub.estimators.infonce import contrast
from miub.estimators.regression import Regression, regress
from miub.estimators.ridge import PENALTIES
from miub.estimators.samples import full_precision
from miub.estimators.tempered import tempered_moments

# The pairs of more samples would cost more than the regression; the bound is at most their log.
_CONTRAST_ON = 256


@torch.no_grad()
def bracket(
    design: Design,
    *,
    order: float = 0.5,
    penalties: Sequence[float] = PENALTIES,
    generator: torch.Generator | None = None,
) -> tuple[Estimate, Estimate]:
    """Return `tempered`, and an InfoNCE bound that needs no second fit.

    The critic of the latter is the regression that leaves the sample out, which follows from
    residuals and leverages.  The other samples' predictions have seen v_i, which can only make it
    look more like theirs: the bound is lower for it, not higher.

    Args:
        design: of N samples, N at least 8.
        order: of `tempered`.
        penalties: of `tempered`.
        generator: draws the noise for the lower bound, on the samples' device; None: seed 0.

    Returns:
        The upper and the lower bound.

    Raises:
        ValueError: an order out of range.
    """
    with full_precision():
        regression = regress(design, penalties)
        if generator is None:
            generator = torch.Generator(design.v.device).manual_seed(0)
        return tempered_moments(regression, order), _left_out_contrast(regression, generator)


def _left_out_contrast(regression: Regression, generator: torch.Generator) -> Estimate:
    design = regression.design
    error = regression.ridge.left_out_error
    covariance = error.mT @ error / design.n + regression.carried + regression.least
    n = min(design.n, _CONTRAST_ON)
    v = design.v[..., :n, :]
    means = moved_by_noise(v - error[..., :n, :], regression.carried, generator)
    noisy = v + design.noise_v.sqrt() * standard_normal(v.shape, generator, v)
    q = LinearGaussian(means, covariance, torch.zeros_like(covariance))
    value, terms = contrast(q, noisy)
    return estimate_of(design, value, terms.std(-1) / n**0.5, n)
