"""Pairs of random vectors whose mutual information is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# (samples, generator) -> u (..., N, d_u), v (..., N, d_v) for a leading shape and N.
Sampler = Callable[[tuple[int, ...], torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pair:
    """Two random vectors.

    Attributes:
        family: what it is an example of.
        name: which one.
        truth: I(u; v) in nats, under the noise model if ``noise`` is not 0.
        sample: draws (*shape, d_u) and (*shape, d_v).
        noise: tau.
    """

    family: str
    name: str
    truth: float
    sample: Sampler
    noise: float = 0.0


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, float32, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def correlated(dimension: int, information: float) -> Sampler:
    """Jointly Gaussian, all canonical correlations equal: I = -d/2 log(1 - rho^2)."""
    rho = math.sqrt(1 - math.exp(-2 * information / dimension))

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = normal((*shape, dimension), generator)
        own = normal((*shape, dimension), generator)
        return u, rho * u + math.sqrt(1 - rho**2) * own

    return sample


def mapped(
    sample: Sampler, of_u: Callable[[Tensor], Tensor], of_v: Callable[[Tensor], Tensor]
) -> Sampler:
    """The images under maps that, being injective, leave the mutual information as it is."""

    def images(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u, v = sample(shape, generator)
        return of_u(u), of_v(v)

    return images


def half_cube(x: Tensor) -> Tensor:
    """``x sqrt|x|``."""
    return x * x.abs().sqrt()


def rotated(x: Tensor) -> Tensor:
    """A fixed rotation of all coordinates."""
    d = x.shape[-1]
    generator = torch.Generator().manual_seed(d)
    return x @ torch.linalg.qr(torch.randn(d, d, generator=generator))[0].to(x.device)


def spiral(x: Tensor, speed: float = 0.25) -> Tensor:
    """The first two coordinates turned by ``speed |x|^2`` (Czyz et al. 2023, arXiv 2306.11078)."""
    angle = speed * x.square().sum(-1)
    first = x[..., 0] * angle.cos() - x[..., 1] * angle.sin()
    second = x[..., 0] * angle.sin() + x[..., 1] * angle.cos()
    return torch.cat([first[..., None], second[..., None], x[..., 2:]], -1)


def identity(x: Tensor) -> Tensor:
    """The map that does nothing."""
    return x


def student(dimension: int, freedom: int, rho: float) -> Sampler:
    """Multivariate Student-t of u and v together, scale matrix with correlations rho."""

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = normal((*shape, dimension), generator)
        v = rho * u + math.sqrt(1 - rho**2) * normal((*shape, dimension), generator)
        chi_squared = normal((*shape, freedom), generator).square().sum(-1, keepdim=True)
        scale = (freedom / chi_squared).sqrt()
        return u * scale, v * scale

    return sample


def student_information(dimension: int, freedom: int, rho: float) -> float:
    """Return I of `student`: the Gaussian value and that of the common scale.

    From the entropy of the multivariate t (Arellano-Valle, Contreras-Reyes and Genton 2013).
    """

    def entropy(d: int) -> float:
        half = torch.tensor([(freedom + d) / 2, freedom / 2], dtype=torch.float64)
        top, bottom = half.lgamma().tolist()
        slope, slope_bottom = half.digamma().tolist()
        shape = bottom - top + d / 2 * math.log(freedom * math.pi)
        return shape + (freedom + d) / 2 * (slope - slope_bottom)

    gaussian = -dimension / 2 * math.log(1 - rho**2)
    return gaussian + 2 * entropy(dimension) - entropy(2 * dimension)


def mixture(points: int, dimension: int, distance: float) -> Sampler:
    """Sample a class of ``points`` equally likely ones; u and v are clouds around its two points.

    Given the class u and v are independent.  Clouds are standard normal, the points of each side
    are on the axes at that distance, so for a large distance I is the class's entropy, log(points).
    """
    if points > dimension:
        raise ValueError("the points are on different axes: points must be at most dimension.")

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        device = generator.device
        label = torch.randint(points, shape, generator=generator, device=device)
        centre = distance * torch.eye(dimension, device=device)[label]
        return (
            centre + normal((*shape, dimension), generator),
            centre.flip(-1) + normal((*shape, dimension), generator),
        )

    return sample


def layer_paths(
    inputs: int, outputs: int, rank: int, decay: float, noise: float
) -> tuple[float, Sampler]:
    """Return a sampler of what the monitor sees, ``u = W x`` and ``v = A x``.

    x is Gaussian with the spectrum ``k^-decay``.

    Returns:
        I under the noise model: without noise it is infinite wherever outputs >= inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    axes = torch.linalg.qr(gaussian(inputs, inputs))[0]
    spread = axes * torch.arange(1, inputs + 1, dtype=torch.float64) ** (-decay / 2)
    W, A = gaussian(outputs, inputs) @ spread, gaussian(rank, inputs) @ spread
    S_u, S_v, S_uv = W @ W.T, A @ A.T, W @ A.T
    S_u += noise * S_u.trace() / outputs * torch.eye(outputs, dtype=torch.float64)
    S_v += noise * S_v.trace() / rank * torch.eye(rank, dtype=torch.float64)
    residual = S_v - S_uv.T @ torch.linalg.solve(S_u, S_uv)
    truth = float(torch.logdet(S_v) - torch.logdet(residual)) / 2

    def sample(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = normal((*shape, inputs), generator)
        return z @ W.float().to(z.device).T, z @ A.float().to(z.device).T

    return truth, sample


def suite() -> list[Pair]:
    """All pairs of the ground truth."""
    pairs = []
    for d, information in ((1, 0.5), (1, 2), (4, 2), (4, 10), (16, 5), (64, 2), (64, 10)):
        pairs.append(Pair("Gaussian", f"d={d}", information, correlated(d, information)))
    pairs += [Pair("independent", f"d={d}", 0.0, correlated(d, 0.0)) for d in (1, 8, 64)]
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "cube": lambda x: x**3,
        "asinh": lambda x: x.asinh(),
        "half-cube": half_cube,
        "rotation": rotated,
        "spiral": spiral,
    }
    for name, image in maps.items():
        for d, information in ((4, 2), (4, 10)):
            sample = correlated(d, information)
            pairs.append(Pair(name, "both sides", information, mapped(sample, image, image)))
            if name in ("cube", "spiral"):
                one_sided = mapped(sample, image, identity)
                pairs.append(Pair(f"{name} of u", "one side", information, one_sided))
    for d, freedom, rho in ((1, 3, 0.8), (4, 3, 0.8), (4, 10, 0.8)):
        truth = student_information(d, freedom, rho)
        name = f"nu={freedom}, d={d}"
        pairs.append(Pair("Student-t", name, truth, student(d, freedom, rho)))
    for d, freedom in ((1, 3), (4, 3)):
        truth = student_information(d, freedom, 0.0)
        pairs.append(Pair("Student-t, uncorrelated", f"d={d}", truth, student(d, freedom, 0.0)))
    for points in (2, 5):
        pairs.append(Pair("mixture", f"{points}", math.log(points), mixture(points, 5, 12.0)))
    for inputs, outputs, rank, decay in (
        (384, 384, 8, 1.0),
        (384, 1536, 8, 1.0),
        (1536, 384, 8, 1.0),
        (384, 384, 64, 1.0),
        (384, 384, 8, 2.0),
    ):
        for noise in (0.001, 0.01, 0.1):
            truth, sample = layer_paths(inputs, outputs, rank, decay, noise)
            name = f"{inputs}->{outputs}, r={rank}, k^-{decay:g}"
            pairs.append(Pair(f"layer, tau={noise:g}", name, truth, sample, noise))
    return pairs
