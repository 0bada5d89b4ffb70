"""Samples of two paths, and shared steps of estimating what they share."""

from __future__ import annotations

import torch
from samplers import normal

from miub.estimators import (
    ESTIMATORS,
    Estimate,
)
from miub.estimators.bracket import bracket, fit_bracket
from miub.estimators.design import Design, design_of
from miub.estimators.samples import prepare

EVERY = sorted(ESTIMATORS)


def pair(n: int, d: int, r: int, seed: int = 0, dtype=torch.float64):
    """Linearly dependent samples with noise of their own."""
    u = normal(seed, n, d, dtype=dtype)
    v = u @ normal(seed + 1, d, r, dtype=dtype) / d**0.5 + 0.5 * normal(seed + 2, n, r, dtype=dtype)
    return u, v


def design(u, v, noise=0.0) -> Design:
    return design_of(prepare(u, v, noise))


def bracketed(samples: Design, **options):
    """The bounds of one fit."""
    upper, lower = bracket([fit_bracket(samples, **options)])
    return tuple(Estimate(e.value[0], e.stderr[0], e.n, e.heaviest[0]) for e in (upper, lower))


def repeated(sampler, count: int, n: int, seed: int = 0):
    return sampler((count, n), torch.Generator().manual_seed(seed))
