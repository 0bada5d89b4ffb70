"""The tempered bound of ranks: for margins of any kind, and for a scale that is shared."""

from __future__ import annotations

import torch
from torch import Tensor

from miub.estimators.conditional import standard_normal
from miub.estimators.design import design_of
from miub.estimators.estimate import Estimate
from miub.estimators.regression import regress
from miub.estimators.samples import full_precision, prepare
from miub.estimators.tempered import tempered_moments


@torch.no_grad()
def ranked(
    u: Tensor, v: Tensor, *, noise: float = 0.0, order: float = 0.5, seed: int = 0
) -> Estimate:
    """`tempered` of the coordinates' normal scores and of their magnitude, in nats.

    Every coordinate is replaced by the normal quantile of its rank.  Mutual information does not
    change under increasing maps of single coordinates, so samples that are Gaussian but for such
    maps are answered as Gaussian ones, and there is no moment that might not exist.  To each side
    the score of the scores' sum of squares is added, a function of what is there already, which
    leaves the mutual information too: it tells of a scale that u and v share.

    At least what `tempered` makes of the scores alone, since more coordinates lower no canonical
    correlation; so an upper bound for Gaussian samples, and a looser one.  Unlike `tempered` it
    depends on the axes: rotated coordinates have other ranks.

    Args:
        u, v: samples (..., N, d_u) and (..., N, d_v), N at least 8.
        noise: tau: isotropic noise of tau times the mean variance of the coordinates, on both
            sides; drawn.
        order: of `tempered`.
        seed: of the noise.

    Returns:
        Estimate: of shape (...); NaN where samples are not finite, 0 where u or v is constant.

    Raises:
        TypeError, ValueError: as `tempered` does.

    Cost: that of `tempered`, and N log N (d_u + d_v) for the ranks.
    """
    with full_precision():
        given = prepare(u, v, noise)
        u, v = given.u, given.v
        if noise > 0:
            generator = torch.Generator(u.device).manual_seed(seed)
            u = u + given.noise_u.sqrt() * standard_normal(u.shape, generator, u)
            v = v + given.noise_v.sqrt() * standard_normal(v.shape, generator, v)
        u, v = (_with_magnitude(normal_scores(x)) for x in (u, v))
        # Noise that was drawn on a constant is not a signal.
        u, v = (x * given.informative[..., None, None] for x in (u, v))
        return tempered_moments(regress(design_of(prepare(u, v, 0.0))), order)


def normal_scores(x: Tensor) -> Tensor:
    """Replace the numbers of every column of x (..., N, d) by the normal quantiles of their ranks.

    Numbers that are equal have their mean rank: a column that is constant becomes zero.  NaN where
    a number is not finite.
    """
    columns = x.mT.contiguous()
    ordered = columns.sort(-1).values
    below, to = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    # Twice a mean rank is a whole number: the scores of tied and of mirrored ranks are exact.
    quantile = (below + to).double() / (2 * x.shape[-2])
    scores = torch.special.ndtri(quantile).to(x.dtype)
    return scores.mT + 0 * x


def _with_magnitude(scores: Tensor) -> Tensor:
    return torch.cat([scores, normal_scores(scores.square().sum(-1, keepdim=True))], -1)
