"""The linear-Gaussian conditional q(v|u) of the variational estimators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miub.estimators.design import design_of
from miub.estimators.positive_definite import jitter, logdet, squared_lengths
from miub.estimators.regression import regression_of
from miub.estimators.ridge import fit_ridge
from miub.estimators.samples import Samples

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class LinearGaussian:
    """``q(v|u_i) = N(means_i, covariance)``.

    Attributes:
        means: (..., n, d_v).
        covariance: (..., d_v, d_v).
        carried: (..., d_v, d_v): covariance of the means over the noise on u, where the means are
            those of u without its noise; else zero.
    """

    means: Tensor
    covariance: Tensor
    carried: Tensor

    def log_density(self, v: Tensor) -> Tensor:
        """Return log q(v_i|u_i), (..., n), for v (..., n, d_v)."""
        return self._log(squared_lengths(v - self.means, self.covariance))

    def log_density_pairs(self, v: Tensor) -> Tensor:
        """Return log q(v_i|u_j), (..., n_v, n), for v (..., n_v, d_v)."""
        left, right = self._whitened(v)
        squares = left.square().sum(-1)[..., :, None] + right.square().sum(-1)[..., None, :]
        return self._log((squares - 2 * left @ right.mT).clamp_min(0))

    def scores(self, v: Tensor) -> Tensor:
        """Return log q(v_i|u_j), (..., n_v, n), up to a number of each v_i's own."""
        left, right = self._whitened(v)
        return (left @ right.mT).sub_(right.square().sum(-1)[..., None, :], alpha=0.5)

    def divergence(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return the KL divergence (..., n) of q(.|u_i) from N(mean (..., 1, d_v), covariance).

        It is the mean over the noise on u.
        """
        r = mean.shape[-1]
        trace = torch.linalg.solve_ex(covariance, self.covariance + self.carried)[0]
        fixed = logdet(covariance) - logdet(self.covariance) - r
        fixed = fixed + trace.diagonal(dim1=-2, dim2=-1).sum(-1)
        return (fixed[..., None] + squared_lengths(self.means - mean, covariance)) / 2

    def _whitened(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and the means in coordinates in which the covariance is the identity."""
        # Less a common origin, or distances would cancel.
        origin = self.means.mean(-2, keepdim=True)
        factor = torch.linalg.cholesky_ex(self.covariance)[0]
        both = torch.cat([v - origin, self.means - origin], -2)
        whitened = torch.linalg.solve_triangular(factor.mT, both, upper=True, left=False)
        return whitened[..., : v.shape[-2], :], whitened[..., v.shape[-2] :, :]

    def _log(self, squares: Tensor) -> Tensor:
        constant = logdet(self.covariance) + self.covariance.shape[-1] * _LOG_2PI
        return -(squares + constant[(..., *(None,) * (squares.ndim - constant.ndim))]) / 2


def fit_linear(
    samples: Samples,
) -> Callable[[Tensor, torch.Generator | None], LinearGaussian]:
    """Fit a conditional by `ridge.fit_ridge`; noise on u and v is in its covariance.

    Returns:
        A function from u (..., n, d_u) to q(v|u).  With a generator, it draws the noise on u and
        moves the means by it.
    """
    mean_u, mean_v = (x.mean(-2, keepdim=True) for x in (samples.u, samples.v))
    centred = replace(samples, u=samples.u - mean_u, v=samples.v - mean_v)
    ridge = fit_ridge(design_of(centred))
    regression = regression_of(centred.margins, ridge.fit)
    weight, carried = ridge.weight(centred.u), regression.carried

    def at(u: Tensor, generator: torch.Generator | None) -> LinearGaussian:
        means = mean_v + (u - mean_u) @ weight
        if generator is None:
            return LinearGaussian(means, regression.conditional, carried)
        means = moved_by_noise(means, carried, generator)
        return LinearGaussian(means, regression.conditional, torch.zeros_like(carried))

    return at


def moved_by_noise(means: Tensor, carried: Tensor, generator: torch.Generator) -> Tensor:
    """Return predictions (..., n, d_v) as they would be from u with its noise, which is drawn.

    Args:
        means: predictions from u without it.
        carried: (..., d_v, d_v), the covariance that the noise gives them.
        generator: on their device.
    """
    # More than rounds a product of the weights: from inner products of samples they are less exact.
    factor = torch.linalg.cholesky_ex(carried + 8 * jitter(carried))[0]
    return means + standard_normal(means.shape, generator, means) @ factor.mT


def standard_normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Return standard normal numbers of a tensor's dtype, on its device."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
