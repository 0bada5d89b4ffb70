"""Fit a conditional on one half of the samples, evaluate on the other, both ways round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from miub.estimators.conditional import Conditional, Fitted, draw, fit_linear
from miub.estimators.estimate import Estimate, estimate_of
from miub.estimators.mlp import fit_mlp
from miub.estimators.samples import FEWEST, Samples, full_precision, prepare

ConditionalName = Literal["linear", "mlp"]

# The training half, q at the held-out u, the held-out v -> value (...) and the terms (..., n) whose
# spread is the value's.
Score = Callable[[Samples, Conditional, Tensor], tuple[Tensor, Tensor]]


def fewest_in_a_half(coordinates: int) -> int:
    """Samples from which the inverse of so many coordinates' covariance has an expectation."""
    return coordinates + 2


@torch.no_grad()
def crossfitted(
    u: Tensor,
    v: Tensor,
    score: Score,
    *,
    noise: float,
    conditional: str,
    seed: int,
    draws_noise: bool,
) -> Estimate:
    """The mean of ``score`` over both halves.

    Args:
        u, v: (..., N, d_u), (..., N, d_v).
        score: what to compute on a half that was held out.
        noise: tau of the derivation's section 5.
        conditional: "linear" or "mlp".
        seed: of the drawn noise and of the network.
        draws_noise: whether the score needs samples that carry the noise.  Otherwise it is in the
            conditional analytically, where that is linear.

    Raises:
        ValueError: an unknown conditional; fewer than 16 samples, or without noise fewer than
            2 (d_v + 2); and as `samples.prepare` does.
    """
    if conditional not in ("linear", "mlp"):
        raise ValueError(f"conditional must be 'linear' or 'mlp', got {conditional!r}.")
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
        generator = torch.Generator(u.device).manual_seed(seed)
        parts = samples.part(0, half), samples.part(half, 2 * half)
        values, variances = [], []
        for training, held_out in (parts, parts[::-1]):
            fitted: Fitted = (
                fit_linear(training) if conditional == "linear" else fit_mlp(training, seed=seed)
            )
            v_held_out = held_out.v
            noisy = noise > 0 and (draws_noise or conditional == "mlp")
            if noisy:
                drawn = draw(v_held_out.shape, generator, v_held_out)
                v_held_out = v_held_out + samples.noise_v.sqrt() * drawn
            q = fitted(held_out.u, generator if noisy else None)
            value, terms = score(training, q, v_held_out)
            values.append(value)
            variances.append(terms.var(-1) / half)
        value = (values[0] + values[1]) / 2
        stderr = (variances[0] + variances[1]).sqrt() / 2
        return estimate_of(samples, value, stderr, 2 * half)
