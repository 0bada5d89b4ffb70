"""Samples as every estimator takes them: checked, wide enough, with the noise model's variances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FEWEST = 8


@dataclass(frozen=True)
class Samples:
    """Pairs of samples under the noise model of docs/miub.md, "What is measured".

    Attributes:
        u: (..., N, d_u), centred, float32 at least.
        v: (..., N, d_v), centred, the same dtype.
        noise_u: (..., 1, 1), variance of the noise on each coordinate of u.
        noise_v: (..., 1, 1), likewise of v.
        informative: (...), whether both sides vary.  A constant is independent of everything.
    """

    u: Tensor
    v: Tensor
    noise_u: Tensor
    noise_v: Tensor
    informative: Tensor

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.u.shape[-2]

    @property
    def heaviest(self) -> Tensor:
        """(...): the largest share that a sample has of all squares of u, or of v; NaN is 0."""
        return larger_share(squares_of(self.u), squares_of(self.v))

    def part(self, start: int, end: int) -> Samples:
        """Return the samples from ``start`` to ``end`` under the same noise, not centred again."""
        return replace(self, u=self.u[..., start:end, :], v=self.v[..., start:end, :])


def prepare(u: Tensor, v: Tensor, noise: float) -> Samples:
    """Check the samples, centre them and work out the noise's variances.

    Raises:
        TypeError: samples that are not real floating-point tensors.
        ValueError: shapes that do not fit, two devices, fewer than 8 samples, negative noise.
    """
    for name, x in (("u", u), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(x)}.")
        if x.ndim < 2 or x.shape[-1] == 0:
            raise ValueError(
                f"{name} must be (..., N, dimension), got {tuple(x.shape)}; one-dimensional "
                "samples are (N, 1)."
            )
    if u.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"u and v must hold the same samples: {tuple(u.shape)} and {tuple(v.shape)} differ "
            "before the last axis."
        )
    if u.device != v.device:
        raise ValueError(f"u is on {u.device} and v on {v.device}; move one.")
    check_number(u.shape[-2], noise)
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    u, variance_u = centred_with_variance(u.detach().to(dtype))
    v, variance_v = centred_with_variance(v.detach().to(dtype))
    informative = ((variance_u > 0) & (variance_v > 0))[..., 0, 0]
    return Samples(u, v, noise * variance_u, noise * variance_v, informative)


def check_number(n: int, noise: float) -> None:
    """Raise a ValueError for fewer than 8 samples, or noise that is negative or infinite."""
    if n < FEWEST:
        raise ValueError(f"at least {FEWEST} samples are needed, got {n}.")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be finite and at least 0, got {noise}.")


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def squares_of(x: Tensor) -> Tensor:
    """Return the squared lengths (..., N) of samples (..., N, d)."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def larger_share(squares_u: Tensor, squares_v: Tensor) -> Tensor:
    """Return the largest share (...) that one of N samples has of the sum of either's squares."""
    shares = (squares.amax(-1) / squares.sum(-1) for squares in (squares_u, squares_v))
    return torch.maximum(*shares).nan_to_num(0)


def energy(x: Tensor) -> Tensor:
    """Return the sum (..., 1, 1) of all squares of x (..., N, d)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).square()


def centred_with_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (..., N, d) centred, and the mean variance (..., 1, 1) of its coordinates."""
    n, d = x.shape[-2:]
    mean = x.mean(-2, keepdim=True)
    x = x - mean
    return x, resolved(energy(x) / (n * d), mean.square().mean(-1, keepdim=True))


def resolved(variance: Tensor, squared_mean: Tensor) -> Tensor:
    """Return a variance, or zero where the arithmetic cannot tell it from rounding of the mean."""
    resolution = 4 * torch.finfo(variance.dtype).eps ** 2 * squared_mean
    # Negated, so that what is not a number stays: it must not pass for a constant.
    return variance * ~(variance <= resolution)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products of float32 in float32, whatever the script allows for its own.

    Gram matrices in TF32 would be off by 1e-3 of their largest entries, more than the noise.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed
