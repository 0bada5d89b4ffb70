"""An upper and a lower bound from one regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from miub.estimators.conditional import LinearGaussian, moved_by_noise, standard_normal
from miub.estimators.design import Design
from miub.estimators.estimate import Estimate, estimate_of
from miub.estimators.infonce import contrast
from miub.estimators.regression import Regression, regression_of
from miub.estimators.ridge import PENALTIES, Fit, best_shrinkage, fit_penalised
from miub.estimators.samples import Margins, full_precision
from miub.estimators.tempered import tempered_moments

# The pairs of more samples would cost more than the regression; the bound is at most their log.
_CONTRAST_ON = 256


@dataclass(frozen=True)
class Bracketed:
    """A fit that is not yet evaluated; several of one shape are evaluated together.

    Attributes:
        margins: the samples without u.
        fit: at its best penalty, not yet shrunk.
    """

    margins: Margins
    fit: Fit


@torch.no_grad()
def fit_bracket(design: Design, penalties: Sequence[float] = PENALTIES) -> Bracketed:
    """Return the fit for `bracket`.

    Args:
        design: of N samples, N at least 8.
        penalties: of `tempered`.
    """
    with full_precision():
        return Bracketed(design.margins, fit_penalised(design, penalties).fit)


@torch.no_grad()
def bracket(
    fits: Sequence[Bracketed], *, order: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Estimate, Estimate]:
    """Return `tempered`, and an InfoNCE bound that needs no second fit, of fits of one shape.

    The critic of the latter is the regression that leaves the sample out, which follows from
    residuals and leverages.  The other samples' predictions have seen v_i, which can only make it
    look more like theirs: the bound is lower for it, not higher.

    Args:
        fits: with as many samples of as many coordinates of v, on one device.
        order: of `tempered`.
        generator: draws the noise for the lower bound, on the samples' device; None: seed 0.

    Returns:
        The upper and the lower bound, (number of fits, ...).

    Raises:
        ValueError: an order out of range.
    """
    margins = _stacked([fit.margins for fit in fits])
    fit = _stacked([fit.fit for fit in fits])
    if generator is None:
        generator = torch.Generator(margins.v.device).manual_seed(0)
    with full_precision():
        shrunk = fit.shrunk(best_shrinkage(fit, margins.v), margins.v)
        regression = regression_of(margins, shrunk)
        return tempered_moments(regression, order), _left_out_contrast(regression, generator)


_Fields = TypeVar("_Fields", Margins, Fit)


def _stacked(parts: Sequence[_Fields]) -> _Fields:
    """Return one of the same kind, whose tensors have a new first axis."""
    tensors = zip(*(vars(part).values() for part in parts), strict=True)
    return type(parts[0])(*map(torch.stack, tensors))


def _left_out_contrast(regression: Regression, generator: torch.Generator) -> Estimate:
    margins = regression.margins
    error = regression.fit.left_out_error
    covariance = error.mT @ error / margins.n + regression.carried + regression.least
    n = min(margins.n, _CONTRAST_ON)
    v = margins.v[..., :n, :]
    means = moved_by_noise(v - error[..., :n, :], regression.carried, generator)
    noisy = v + margins.noise_v.sqrt() * standard_normal(v.shape, generator, v)
    q = LinearGaussian(means, covariance, torch.zeros_like(covariance))
    value, terms = contrast(q, noisy)
    return estimate_of(margins, value, terms.std(-1) / n**0.5, n)
