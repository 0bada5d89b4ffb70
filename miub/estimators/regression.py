"""The moments of v, and of v given u, under the noise model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.design import Design
from miub.estimators.positive_definite import jitter
from miub.estimators.ridge import PENALTIES, Fit, fit_ridge
from miub.estimators.samples import Margins, Samples


@dataclass(frozen=True)
class Regression:
    """A ridge regression of v on u, and the covariances that follow from it.

    Attributes:
        margins: the samples without u.
        fit: of v on u.
        covariance: (..., d_v, d_v), of v with its noise.
        conditional: (..., d_v, d_v), of v given u, both with their noise.
        carried: (..., d_v, d_v), the part of ``conditional`` that the noise on u brings.
        least: (..., d_v, d_v), the part of both that the noise on v brings.
    """

    margins: Margins
    fit: Fit
    covariance: Tensor
    conditional: Tensor
    carried: Tensor
    least: Tensor


def regress(design: Design, penalties: Sequence[float] = PENALTIES) -> Regression:
    """Fit to centred samples, and take the moments; see `ridge.fit_ridge`."""
    return regression_of(design.margins, fit_ridge(design, penalties).fit)


def regression_of(margins: Margins, fit: Fit) -> Regression:
    """Return the moments that follow from a fit."""
    covariance, least = _covariance(margins.v, margins.noise_v)
    carried = margins.noise_u * fit.squared_weight
    residual = fit.unbiased_residual
    conditional = residual.mT @ residual / margins.n + carried + least
    return Regression(margins, fit, covariance, conditional, carried, least)


def spread(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return the mean (..., 1, d_v) and covariance (..., d_v, d_v) of v with its noise."""
    mean = samples.v.mean(-2, keepdim=True)
    return mean, _covariance(samples.v - mean, samples.noise_v)[0]


def _covariance(v: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance of centred v with its noise, and the part that the noise brings."""
    covariance = v.mT @ v / (v.shape[-2] - 1)
    identity = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    least = noise * identity + jitter(covariance)
    return covariance + least, least
