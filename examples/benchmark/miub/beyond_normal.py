"""The forty tasks of the "Beyond Normal" benchmark (Czyz et al. 2023, arXiv 2306.11078).

Written from the definitions in the paper: every task is a distribution whose mutual information is
known, and most are images of it under maps that leave the mutual information as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from examples.benchmark.miub.distributions import (
    Pair,
    Sampler,
    half_cube,
    identity,
    mapped,
    normal,
    spiral,
    student,
    student_information,
)

_CORRELATION = 0.75  # of the tasks with one coordinate on each side
_PAIRED = 0.8  # of each of the two pairs of coordinates that are correlated, "2-pair"
_DENSE = 0.5  # of any two coordinates, "dense"


def tasks() -> list[Pair]:
    """All forty, by family."""
    return [
        *_normal_tasks(),
        *_one_dimensional_tasks(),
        *_image_tasks("half-cube", half_cube, half_cube),
        *_image_tasks("normal CDF", _normal_cdf, _normal_cdf),
        *_spiral_tasks(),
        *_student_tasks(),
        *_uniform_tasks(),
    ]


def paired(dimension: int) -> tuple[float, Sampler]:
    """I of, and samples of, Gaussian u and v whose first two coordinates are correlated."""
    rho = torch.zeros(dimension)
    rho[:2] = _PAIRED

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u, own = (normal((*shape, dimension), generator) for _ in range(2))
        r = rho.to(u.device)
        return u, r * u + (1 - r.square()).sqrt() * own

    return -math.log(1 - _PAIRED**2), sample


def dense(dimension: int) -> tuple[float, Sampler]:
    """I of, and samples of, Gaussian u and v in which any two coordinates are correlated by 1/2."""

    def log_determinant(d: int) -> float:
        return (d - 1) * math.log(1 - _DENSE) + math.log(1 + (d - 1) * _DENSE)

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shared = normal((*shape, 1), generator)
        u, v = (normal((*shape, dimension), generator) for _ in range(2))
        return tuple(math.sqrt(_DENSE) * shared + math.sqrt(1 - _DENSE) * own for own in (u, v))  # type: ignore[return-value]

    return log_determinant(dimension) - log_determinant(2 * dimension) / 2, sample


def bivariate(rho: float = _CORRELATION) -> tuple[float, Sampler]:
    """I of, and samples of, two correlated standard normal numbers."""

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u, own = (normal((*shape, 1), generator) for _ in range(2))
        return u, rho * u + math.sqrt(1 - rho**2) * own

    return -math.log(1 - rho**2) / 2, sample


def additive_noise(width: float) -> tuple[float, Sampler]:
    """``v = u + e``, u uniform on [0, 1] and e on [-width, width]."""
    information = width - math.log(2 * width) if width <= 0.5 else 1 / (4 * width)

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u, e = (
            torch.rand((*shape, 1), generator=generator, device=generator.device) for _ in range(2)
        )
        return u, u + width * (2 * e - 1)

    return information, sample


def _normal_tasks() -> list[Pair]:
    made = [Pair("normal", "1 x 1", *bivariate())]
    made += [Pair("normal", f"2-pair, {d} x {d}", *paired(d)) for d in (2, 3, 5, 25)]
    made += [Pair("normal", f"dense, {d} x {d}", *dense(d)) for d in (2, 3, 5, 25, 50)]
    return made


def _one_dimensional_tasks() -> list[Pair]:
    truth, sample = bivariate()
    maps: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "bimodal": (_bimodal((0.3, 0.0), (0.7, 5.0)), _bimodal((0.5, -1.0), (0.5, 3.0))),
        "wiggly": (_wiggly_u, _wiggly_v),
        "swiss roll": (lambda x: _swiss_roll(_normal_cdf(x)), _normal_cdf),
    }
    return [
        Pair(name, "2 x 1" if name == "swiss roll" else "1 x 1", truth, mapped(sample, of_u, of_v))
        for name, (of_u, of_v) in maps.items()
    ]


def _image_tasks(
    family: str, of_u: Callable[[Tensor], Tensor], of_v: Callable[[Tensor], Tensor]
) -> list[Pair]:
    truth, sample = bivariate()
    made = [Pair(family, "1 x 1", truth, mapped(sample, of_u, of_v))]
    for d in (3, 5, 25):
        truth, sample = paired(d)
        made.append(Pair(family, f"2-pair, {d} x {d}", truth, mapped(sample, of_u, of_v)))
    return made


def _spiral_tasks() -> list[Pair]:
    first: dict[str, Callable[[Tensor], Tensor]] = {
        "spiral": identity,
        "spiral of normal CDF": _normal_cdf,
    }
    made = []
    for family, before in first.items():
        for d in (3, 5, 25):
            truth, sample = paired(d)
            sample = mapped(mapped(sample, before, before), _turned(0, 1), _turned(1, 2))
            made.append(Pair(family, f"2-pair, {d} x {d}", truth, sample))
    return made


def _student_tasks() -> list[Pair]:
    def pair(family: str, d: int, freedom: int, image: Callable[[Tensor], Tensor]) -> Pair:
        truth = student_information(d, freedom, 0.0)
        sample = mapped(student(d, freedom, 0.0), image, image)
        return Pair(family, f"nu={freedom}, {d} x {d}", truth, sample)

    plain = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3))
    bounded = ((1, 1), (2, 1), (3, 2), (5, 2))
    return [
        *(pair("Student-t", d, freedom, identity) for d, freedom in plain),
        *(pair("asinh of Student-t", d, freedom, torch.asinh) for d, freedom in bounded),
    ]


def _uniform_tasks() -> list[Pair]:
    return [
        Pair("uniform, additive noise", f"{width:g}, 1 x 1", *additive_noise(width))
        for width in (0.1, 0.75)
    ]


def _normal_cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


def _bimodal(*parts: tuple[float, float]) -> Callable[[Tensor], Tensor]:
    """Return the map that gives a standard normal number a mixture's distribution.

    Args:
        parts: weight and mean of each normal component of variance 1.
    """

    def cdf(x: Tensor) -> Tensor:
        return sum((w * torch.special.ndtr(x - mean) for w, mean in parts), torch.zeros_like(x))

    def image(x: Tensor) -> Tensor:
        p = torch.special.ndtr(x.double())
        low, high = torch.full_like(p, -20.0), torch.full_like(p, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = cdf(middle) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(x.dtype)

    return image


def _wiggly_u(x: Tensor) -> Tensor:
    waves = 0.4 * x.sin() + 0.2 * (1.7 * x + 1).sin() + 0.03 * (3.3 * x - 2.5).sin()
    return x + waves


def _wiggly_v(x: Tensor) -> Tensor:
    waves = 0.17 * (1.3 * x + 3.5).sin() + 0.02 * (4.3 * x - 2.5).sin() - 0.4 * (0.4 * x).sin()
    return x + waves


def _swiss_roll(x: Tensor) -> Tensor:
    """(..., 2) from (..., 1) in [0, 1]: one turn and a half of a spiral."""
    angle = 1.5 * math.pi * (1 + 2 * x)
    return torch.cat([angle * angle.cos(), angle * angle.sin()], -1) / 21


def _turned(first: int, second: int) -> Callable[[Tensor], Tensor]:
    """`spiral` in the plane of two coordinates, at a speed of one over the dimension."""

    def image(x: Tensor) -> Tensor:
        d = x.shape[-1]
        order = [first, second, *(i for i in range(d) if i not in (first, second))]
        back = sorted(range(d), key=order.__getitem__)
        return spiral(x[..., order], 1 / d)[..., back]

    return image
