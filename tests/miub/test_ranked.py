"""The bound on ranks, on known answers."""

from __future__ import annotations

import math

import pytest
import torch
from estimating import repeated

from examples.benchmark.miub.distributions import (
    correlated,
    identity,
    layer_paths,
    mapped,
    student,
    student_information,
)
from miub.estimators import (
    ranked,
    tempered,
)
from miub.estimators.ranked import normal_scores


def test_scores_are_the_normal_quantiles_of_mean_ranks():
    x = torch.tensor([[3.0, 5], [1, 5], [3, 5], [-2, 5], [9, 5], [3, 5]])
    normal = torch.distributions.Normal(0, 1)
    # Ranks 4, 2, 4, 1, 6, 4 of the first column, the three that are equal sharing 3, 4 and 5.
    quantiles = (torch.tensor([4.0, 2, 4, 1, 6, 4]) - 0.5) / 6
    found = normal_scores(x)
    torch.testing.assert_close(found[:, 0], normal.icdf(quantiles))
    assert (found[:, 1] == 0).all()
    x[2, 0] = math.inf
    assert normal_scores(x)[2, 0].isnan()


def test_increasing_maps_of_the_coordinates_leave_the_ranked_bound():
    u, v = (x.double() for x in correlated(3, 2.0)((400,), torch.Generator().manual_seed(0)))
    expected = ranked(u, v)
    for of_u, of_v in ((lambda x: x**3, torch.exp), (torch.asinh, lambda x: 5 * x - 2)):
        found = ranked(of_u(u), of_v(v))
        torch.testing.assert_close(found.value, expected.value)
        torch.testing.assert_close(found.stderr, expected.stderr)


@pytest.mark.parametrize("information", [2.0, 10.0])
def test_a_side_that_is_cubed_alone_is_covered_by_ranks(information):
    u, v = repeated(mapped(correlated(4, information), lambda x: x**3, identity), 10, 512)
    assert tempered(u, v).value.mean() < 0.8 * information
    found = ranked(u, v).value
    assert (found > information).all()
    assert (found < 2.4 * information).all()


@pytest.mark.parametrize(("d", "freedom"), [(1, 1), (2, 2), (5, 3)])
def test_a_scale_that_two_sides_share_is_told_by_ranks(d, freedom):
    truth = student_information(d, freedom, 0.0)
    found = ranked(*repeated(student(d, freedom, 0.0), 4, 4000))
    assert (found.value > truth - 2 * found.stderr - 0.01).all()
    assert (found.value < 2 * truth).all()


def test_ranks_bound_gaussian_samples_under_the_noise_model():
    truth, sampler = layer_paths(48, 48, 4, 1.0, 0.1)
    # Not with seed 0, of which the noise is drawn.
    found = ranked(*repeated(sampler, 6, 1024, seed=1), noise=0.1).value
    assert (found >= truth).all()
    assert (found <= 2.2 * truth).all()
