"""The inner products of u that a ridge regression of v on u needs, in the smaller dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miub.estimators.positive_definite import add_outer_product
from miub.estimators.samples import (
    Margins,
    Samples,
    SideMoments,
    both_sides,
    centred,
    check_number,
    squares_of,
)

# Numbers of u in float32 that are held at once: 2 MiB, 1024 columns of 512 samples.
_AT_ONCE = 2**19


@dataclass(frozen=True)
class Design:
    """Centred samples of u, as inner products, with v.

    Attributes:
        u: (..., N, d_u) where it has fewer coordinates than samples; None: ``gram`` says all.
        gram: ``u^T u`` (..., d_u, d_u), or without u ``u u^T`` (..., N, N); the upper triangle may
            be left out.
        margins: the samples without u.
    """

    u: Tensor | None
    gram: Tensor
    margins: Margins

    @property
    def energy(self) -> Tensor:
        """Sum of all squares of u, (..., 1, 1)."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def design_of(samples: Samples) -> Design:
    """Return the inner products of samples that are held whole."""
    u = samples.u
    n, d = u.shape[-2:]
    gram = u.new_zeros(*u.shape[:-2], min(n, d), min(n, d))
    add_outer_product(gram, u.mT if d < n else u)
    return Design(u if d < n else None, gram, samples.margins)


def design_by_columns(
    columns: Callable[[int, int], Tensor], d: int, v: Tensor, noise: float
) -> Design:
    """Return the inner products of samples that are read a few coordinates at a time.

    With as many coordinates as samples or more, u is never held whole.

    Args:
        columns: from a first coordinate and an end to a tensor (N, end - first), float32, that may
            be overwritten.
        d: the number of coordinates.
        v: (N, d_v), float32.
        noise: tau.

    Raises:
        ValueError: fewer than 8 samples, negative noise.
    """
    n = v.shape[-2]
    check_number(n, noise)
    fewer = d < n
    gram, means = v.new_zeros(min(n, d), min(n, d)), v.new_empty(1, d)
    step = d if fewer else max(1, _AT_ONCE // n)
    for start in range(0, d, step):
        end = min(start + step, d)
        x = columns(start, end)
        x.sub_(torch.mean(x, -2, keepdim=True, out=means[:, start:end]))
        add_outer_product(gram, x.mT if fewer else x)
    squared_mean = means.square().mean(-1, keepdim=True)
    v, moments_v = centred(v)
    moments_u = SideMoments.of(squares_of(x) if fewer else gram.diagonal(), d, squared_mean)
    informative, heaviest = both_sides(moments_u, moments_v)
    margins = Margins(
        v, noise * moments_u.variance, noise * moments_v.variance, informative, heaviest
    )
    return Design(x if fewer else None, gram, margins)
