"""Samples without moments, and with too few: warned of or refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from examples.benchmark.miub.distributions import (
    correlated,
    identity,
    mapped,
)
from miub.estimators import (
    club,
    gaussian,
    infonce,
    l1out,
    ranked,
    tempered,
    vub,
)

OF_MOMENTS = [tempered, gaussian, club, vub, l1out]


def cauchy(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(2, n, d, generator=generator, dtype=torch.float64) - 0.5
    u, v = (math.pi * angles).tan()
    return u, v


@pytest.mark.parametrize("estimator", OF_MOMENTS)
def test_samples_without_moments_are_warned_of_and_give_nothing_negative(estimator):
    """`club` and `l1out` ran off to tens of nats below zero."""
    for seed in range(3):
        u, v = cauchy(2000, 3, seed)
        with pytest.warns(UserWarning, match=f"{estimator.__name__}: a single sample") as caught:
            found = estimator(u, v + u)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert 0 <= found.value < math.inf
        assert found.heaviest > 0.2


LIGHT = {
    "normal": identity,
    "uniform": torch.special.ndtr,
    "exponential": lambda x: -torch.special.ndtr(x).log(),
}


@pytest.mark.parametrize("n", [16, 64, 512, 8192])
@pytest.mark.parametrize("name", LIGHT)
def test_tails_that_have_moments_are_not_warned_of(name, n):
    u, v = mapped(correlated(3, 1.0), LIGHT[name], LIGHT[name])(
        (n,), torch.Generator().manual_seed(0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tempered(u, v)


def test_a_lower_bound_and_ranks_need_no_moments():
    u, v = cauchy(2000, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= infonce(u, v).value < 0.1
        assert ranked(u, v).value < 0.1
        assert ranked(u, u + v).value > 0.5


@pytest.mark.parametrize("estimator", [club, vub, l1out, infonce])
def test_halves_that_cannot_give_a_covariance_are_refused(estimator):
    """64 samples of 64 coordinates gave -4e5 nats, or 7e4, for a truth of 2."""
    u, v = correlated(64, 2.0)((128,), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="draw 132"):
        estimator(u, v)
    assert estimator(u, v, noise=0.01).value.isfinite()
    enough = correlated(6, 2.0)((16,), torch.Generator().manual_seed(0))
    assert club(*enough).value.isfinite()
