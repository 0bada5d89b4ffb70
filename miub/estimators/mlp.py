"""A conditional q(v|u) whose mean and spread are a small network's, for what is not linear."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miub.estimators.conditional import Fitted, draw
from miub.estimators.regression import regress
from miub.estimators.ridge import logdet
from miub.estimators.samples import Samples, squared_lengths

_HIDDEN, _STEPS, _RATE, _DECAY = 64, 300, 5e-3, 1e-2
_VALIDATED = 4  # one sample of so many is kept to stop by


@dataclass(frozen=True)
class DiagonalGaussian:
    """``q(y|u_i) = N(centre_i, diag(exp(2 log_scale_i)))`` of ``y = factor^-1 v``.

    Attributes:
        centre: (..., n, d_v).
        log_scale: (..., n, d_v).
        factor: (..., d_v, d_v), lower triangular.
    """

    centre: Tensor
    log_scale: Tensor
    factor: Tensor

    def log_density(self, v: Tensor) -> Tensor:
        """See `conditional.Conditional`."""
        z = (_whitened(v, self.factor) - self.centre) * (-self.log_scale).exp()
        return self._constant() - z.square().sum(-1) / 2

    def log_density_pairs(self, v: Tensor) -> Tensor:
        """See `conditional.Conditional`."""
        y = _whitened(v, self.factor)
        origin = y.mean(-2, keepdim=True)
        y, centre = y - origin, self.centre - origin
        weight = (-2 * self.log_scale).exp()
        squares = y.square() @ weight.mT - 2 * y @ (centre * weight).mT
        squares = squares + (centre.square() * weight).sum(-1)[..., None, :]
        return self._constant()[..., None, :] - squares.clamp_min(0) / 2

    def divergence(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """See `conditional.Conditional`."""
        spread = _whitened(_whitened(covariance, self.factor).mT, self.factor)
        inverse = torch.linalg.inv_ex(spread)[0]
        own = (2 * self.log_scale).exp()
        trace = (own * inverse.diagonal(dim1=-2, dim2=-1)[..., None, :]).sum(-1)
        distance = squared_lengths(self.centre - _whitened(mean, self.factor), spread)
        entropy = 2 * self.log_scale.sum(-1) + own.shape[-1]
        return (logdet(spread)[..., None] - entropy + trace + distance) / 2

    def _constant(self) -> Tensor:
        """(..., n): log densities at the centres."""
        volume = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)[..., None]
        r = self.centre.shape[-1]
        return -self.log_scale.sum(-1) - volume - r * math.log(2 * math.pi) / 2


def fit_mlp(samples: Samples, *, seed: int = 0) -> Fitted:
    """A network on top of the linear-Gaussian conditional.

    It gives what the linear conditional leaves: a mean, and a scale for each coordinate, both of
    the linear residual in coordinates in which its covariance is the identity.  It starts at zero,
    is trained by maximum likelihood on three samples of four, and the weights are taken from the
    step at which the fourth were likeliest.  Noise is drawn.

    Args:
        samples: (..., N, d_u) and (..., N, d_v); one network for each of the leading dimensions.
        seed: of the initial weights and of the noise.

    Cost: 300 steps of N (d_u + d_v) 64 multiplications.
    """
    mean_u, mean_v = (x.mean(-2, keepdim=True) for x in (samples.u, samples.v))
    regression = regress(replace(samples, u=samples.u - mean_u, v=samples.v - mean_v))
    weight = regression.ridge.weight
    factor = torch.linalg.cholesky_ex(regression.conditional)[0]
    scale = samples.u.std((-2, -1), keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)

    def linear(u: Tensor) -> Tensor:
        return _whitened(mean_v + (u - mean_u) @ weight, factor)

    generator = torch.Generator(samples.u.device).manual_seed(seed)
    u = samples.u + samples.noise_u.sqrt() * draw(samples.u.shape, generator, samples.u)
    v = samples.v + samples.noise_v.sqrt() * draw(samples.v.shape, generator, samples.v)
    network = _trained(_bounded((u - mean_u) / scale), _whitened(v, factor) - linear(u), generator)

    def at(u: Tensor, generator: torch.Generator | None) -> DiagonalGaussian:
        if generator is not None:
            u = u + samples.noise_u.sqrt() * draw(u.shape, generator, u)
        shift, log_scale = _outputs(network, _bounded((u - mean_u) / scale))
        return DiagonalGaussian(linear(u) + shift, log_scale, factor)

    return at


def _trained(x: Tensor, target: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Weights for inputs (..., n, d_u) and linear residuals (..., n, d_v)."""
    batch, (n, d), r = x.shape[:-2], x.shape[-2:], target.shape[-1]
    # A caller's inference mode would leave nothing to train.
    with torch.inference_mode(False), torch.enable_grad():
        x, target = x.clone(), target.clone()
        trained = (torch.arange(n, device=x.device) % _VALIDATED != 0).to(x.dtype)
        weights = [
            draw((*batch, d, _HIDDEN), generator, x) / d**0.5,
            x.new_zeros((*batch, 1, _HIDDEN)),
            draw((*batch, _HIDDEN, _HIDDEN), generator, x) / _HIDDEN**0.5,
            x.new_zeros((*batch, 1, _HIDDEN)),
            x.new_zeros((*batch, _HIDDEN, 2 * r)),
            x.new_zeros((*batch, 1, 2 * r)),
        ]
        weights = [weight.requires_grad_() for weight in weights]
        optimizer = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY, foreach=True)
        best = [weight.detach().clone() for weight in weights]
        least = x.new_full((*batch, 1, 1), math.inf)
        for _ in range(_STEPS):
            shift, log_scale = _outputs(weights, x)
            surprise = ((target - shift) * (-log_scale).exp()).square() / 2 + log_scale
            surprise = surprise.sum(-1)
            held_out = (surprise.detach() * (1 - trained)).sum(-1)[..., None, None]
            # Kept on the device: each leading index stops at a step of its own.
            better = held_out < least
            least = torch.where(better, held_out, least)
            best = [torch.where(better, w.detach(), b) for w, b in zip(weights, best, strict=True)]
            optimizer.zero_grad()
            ((surprise * trained).sum(-1) / trained.sum()).sum().backward()
            optimizer.step()
    return best


def _outputs(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and log scale (..., n, d_v), the latter within [-3, 3]."""
    hidden = torch.nn.functional.silu(x @ weights[0] + weights[1])
    hidden = torch.nn.functional.silu(hidden @ weights[2] + weights[3])
    shift, log_scale = (hidden @ weights[4] + weights[5]).chunk(2, -1)
    return shift, 3 * (log_scale / 3).tanh()


def _bounded(x: Tensor) -> Tensor:
    """A sample far out must not drive the network where it has seen nothing."""
    return x.asinh()


def _whitened(x: Tensor, factor: Tensor) -> Tensor:
    """(..., n, r): ``factor^-1 x_i``."""
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT
