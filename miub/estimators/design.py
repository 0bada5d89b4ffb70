"""The inner products of u that a ridge regression of v on u needs, in the smaller dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from miub.estimators.positive_definite import add_outer_product
from miub.estimators.samples import (
    Samples,
    centred_with_variance,
    check_number,
    energy,
    larger_share,
    prepare,
    resolved,
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
        energy: (..., 1, 1), the sum of all squares of u.
        v: (..., N, d_v), centred.
        noise_u, noise_v: (..., 1, 1), variance of the noise on each coordinate.
        informative: (...), whether both sides vary.
        heaviest: (...), the largest share that a sample has of all squares of u, or of v.
    """

    u: Tensor | None
    gram: Tensor
    energy: Tensor
    v: Tensor
    noise_u: Tensor
    noise_v: Tensor
    informative: Tensor
    heaviest: Tensor

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.v.shape[-2]


def design_of(samples: Samples) -> Design:
    """Return the inner products of samples that are held whole."""
    u, v = samples.u, samples.v
    n, d = u.shape[-2:]
    gram = u.new_zeros(*u.shape[:-2], min(n, d), min(n, d))
    add_outer_product(gram, u.mT if d < n else u)
    return Design(
        u if d < n else None,
        gram,
        energy(u),
        v,
        samples.noise_u,
        samples.noise_v,
        samples.informative,
        samples.heaviest,
    )


def design_by_columns(
    columns: Callable[[int, int], Tensor], d: int, v: Tensor, noise: float
) -> Design:
    """Return the inner products of samples that are read a few coordinates at a time.

    With as many coordinates as samples or more, u is never held whole.

    Args:
        columns: from a first coordinate and an end to new tensors (N, end - first), float32.
        d: the number of coordinates.
        v: (N, d_v), float32.
        noise: tau.

    Raises:
        ValueError: fewer than 8 samples, negative noise.
    """
    n = v.shape[-2]
    if d < n:
        return design_of(prepare(columns(0, d), v, noise))
    check_number(n, noise)
    gram, squared_mean = v.new_zeros(n, n), v.new_zeros(1, 1)
    step = max(1, _AT_ONCE // n)
    for start in range(0, d, step):
        x = columns(start, min(start + step, d))
        mean = x.mean(-2, keepdim=True)
        squared_mean += mean.square().sum(-1, keepdim=True) / d
        add_outer_product(gram, x.sub_(mean))
    squares = gram.diagonal()
    total = squares.sum().view(1, 1)
    variance_u = resolved(total / (n * d), squared_mean)
    v, variance_v = centred_with_variance(v)
    informative = ((variance_u > 0) & (variance_v > 0))[..., 0, 0]
    return Design(
        None,
        gram,
        total,
        v,
        noise * variance_u,
        noise * variance_v,
        informative,
        larger_share(squares, squares_of(v)),
    )
