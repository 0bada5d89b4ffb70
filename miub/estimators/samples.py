"""Samples as every estimator takes them: checked, wide enough, with the noise model's variances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalora.autocast import without_autocast

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
        heaviest: (...), the largest share that one sample has of all squares of u, or of v.
    """

    u: Tensor
    v: Tensor
    noise_u: Tensor
    noise_v: Tensor
    informative: Tensor
    heaviest: Tensor

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.u.shape[-2]

    @property
    def margins(self) -> Margins:
        """The samples without u."""
        return Margins(self.v, self.noise_u, self.noise_v, self.informative, self.heaviest)

    def part(self, start: int, end: int) -> Samples:
        """Return the samples from ``start`` to ``end`` under the same noise, not centred again."""
        return replace(self, u=self.u[..., start:end, :], v=self.v[..., start:end, :])


@dataclass(frozen=True)
class Margins:
    """The samples without u, and their noise: what the moments of a regression need beside its fit.

    Attributes:
        v: (..., N, d_v), centred.
        noise_u, noise_v: (..., 1, 1), variance of the noise on each coordinate.
        informative: (...), whether both sides vary.
        heaviest: (...), the largest share that one sample has of all squares of u, or of v.
    """

    v: Tensor
    noise_u: Tensor
    noise_v: Tensor
    informative: Tensor
    heaviest: Tensor

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.v.shape[-2]


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
    (u, moments_u), (v, moments_v) = (centred(x.detach().to(dtype)) for x in (u, v))
    informative, heaviest = both_sides(moments_u, moments_v)
    return Samples(
        u, v, noise * moments_u.variance, noise * moments_v.variance, informative, heaviest
    )


def check_number(n: int, noise: float) -> None:
    """Raise a ValueError for fewer than 8 samples, or noise that is negative or infinite."""
    if n < FEWEST:
        raise ValueError(f"at least {FEWEST} samples are needed, got {n}.")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be finite and at least 0, got {noise}.")


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


@dataclass(frozen=True)
class SideMoments:
    """Second moments of one side, centred.

    Attributes:
        squares: (..., N), the squared length of each sample.
        variance: (..., 1, 1), the mean variance of the coordinates; zero where the arithmetic
            cannot tell it from rounding of their mean.
    """

    squares: Tensor
    variance: Tensor

    @classmethod
    def of(cls, squares: Tensor, d: int, squared_mean: Tensor) -> SideMoments:
        """Return those of d coordinates, whose squared means have the mean (..., 1, 1)."""
        variance = squares.sum(-1)[..., None, None] / (squares.shape[-1] * d)
        resolution = 4 * torch.finfo(squares.dtype).eps ** 2 * squared_mean
        # Negated, so that what is not a number stays: it must not pass for a constant.
        return cls(squares, variance * ~(variance <= resolution))


def centred(x: Tensor) -> tuple[Tensor, SideMoments]:
    """Return x (..., N, d) centred, and its moments."""
    mean = x.mean(-2, keepdim=True)
    x = x - mean
    squared_mean = mean.square().mean(-1, keepdim=True)
    return x, SideMoments.of(squares_of(x), x.shape[-1], squared_mean)


def squares_of(x: Tensor) -> Tensor:
    """Return the squared lengths (..., N) of samples (..., N, d)."""
    return torch.linalg.vector_norm(x, dim=-1).square()


def both_sides(u: SideMoments, v: SideMoments) -> tuple[Tensor, Tensor]:
    """Return whether both sides vary (...), and the larger of their samples' largest shares (...).

    The share of a sample is that of all squares of its side; NaN is 0.
    """
    informative = ((u.variance > 0) & (v.variance > 0))[..., 0, 0]
    shares = (side.squares.amax(-1) / side.squares.sum(-1) for side in (u, v))
    return informative, torch.maximum(*shares).nan_to_num(0)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute matrix products of float32 in float32, whatever the script allows for its own.

    Gram matrices in TF32, or under autocast, would be off by 1e-3 of their largest entries or more,
    which is more than the noise.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        with without_autocast():
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = allowed
