"""Fit a conditional on one half of the samples, evaluate on the other, both ways round."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from miub.estimators.conditional import LinearGaussian, fit_linear, standard_normal
from miub.estimators.estimate import Estimate, estimate_of
from miub.estimators.samples import FEWEST, Samples, full_precision, prepare

# The training half, q at the held-out u, the held-out v -> value (...) and the terms (..., n) whose
# spread is the value's.
Score = Callable[[Samples, LinearGaussian, Tensor], tuple[Tensor, Tensor]]


def fewest_in_a_half(coordinates: int) -> int:
    """Return from how many samples the inverse of a covariance of that size has an expectation."""
    return coordinates + 2


@torch.no_grad()
def crossfitted(
    u: Tensor, v: Tensor, score: Score, *, noise: float, drawn_with: int | None = None
) -> Estimate:
    """Return the mean of ``score`` over both halves.

    Args:
        u, v: (..., N, d_u), (..., N, d_v).
        score: computed on a half that was held out.
        noise: tau of the noise model.
        drawn_with: seed of the noise, for a score that needs samples that carry it; None: the noise
            is in the conditional analytically.

    Raises:
        ValueError: fewer than 16 samples, or without noise fewer than 2 (d_v + 2); and as
            `samples.prepare` does.
    """
    with full_precision():
        samples = prepare(u, v, noise)
        half = samples.n // 2
        if half < FEWEST:
            raise ValueError(f"two halves of 8 samples are needed, got {samples.n}; draw 16.")
        if noise == 0 and half < fewest_in_a_half(v.shape[-1]):
            raise ValueError(
                f"half of {samples.n} samples cannot give the covariance of {v.shape[-1]} "
                f"coordinates of v given u, whose inverse is needed; draw "
                f"{2 * fewest_in_a_half(v.shape[-1])}, give noise=, or take tempered, which holds "
                "out no samples."
            )
        generator = None
        if drawn_with is not None and noise > 0:
            generator = torch.Generator(u.device).manual_seed(drawn_with)
        parts = samples.part(0, half), samples.part(half, 2 * half)
        values, variances = [], []
        for training, held_out in (parts, parts[::-1]):
            q_of = fit_linear(training)
            v_held_out = held_out.v
            if generator is not None:
                drawn = standard_normal(v_held_out.shape, generator, v_held_out)
                v_held_out = v_held_out + samples.noise_v.sqrt() * drawn
            value, terms = score(training, q_of(held_out.u, generator), v_held_out)
            values.append(value)
            variances.append(terms.var(-1) / half)
        value = (values[0] + values[1]) / 2
        stderr = (variances[0] + variances[1]).sqrt() / 2
        return estimate_of(samples, value, stderr, 2 * half)
