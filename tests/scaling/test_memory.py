"""Scalings of P alone: the pace at which an adapter forgets, and the age of its columns."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalora.scaling.memory import bounded, descent, leak, longest, shares


@given(st.floats(1.01, 1e4), st.floats(0, 1e3), st.floats(0, 1e3))
def test_leak_is_within_0_and_1_and_forgets_step_by_step(
    memory: float, first: float, second: float
) -> None:
    alpha = leak(memory, first)
    assert 0 <= alpha <= 1
    assert leak(memory, 0) == 1
    assert leak(memory, first) * leak(memory, second) == pytest.approx(leak(memory, first + second))
    in_a_tensor = leak(memory, torch.tensor(first, dtype=torch.float64))
    assert float(in_a_tensor) == pytest.approx(alpha)


@given(st.integers(2, 300), st.integers(1, 7))
def test_leaked_steps_sum_to_the_memory(memory: int, interval: int) -> None:
    """A column that every step adds 1 to settles at K, as an average over K steps does."""
    length = 0.0
    for _ in range(40 * memory // interval + 1):
        length = leak(memory, interval) * length + interval
    settled = interval / (1 - leak(memory, interval))
    assert length == pytest.approx(settled)
    assert memory * (1 - 1e-12) <= settled <= memory + interval


matrices = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 4))


@given(matrices, st.floats(0.5, 50), st.floats(1e-4, 1.0), st.integers(0, 2**31))
def test_bounded_age_is_the_reference_and_leaves_no_column_older(
    shape: tuple[int, int, int], memory: float, rate: float, seed: int
) -> None:
    layers, m, r = shape
    generator = torch.Generator().manual_seed(seed)
    P, U = torch.randn(2, layers, m, r, generator=generator, dtype=torch.float64).unbind()
    P[:, :, 0] *= 100
    step = rate * U.square().sum((1, 2)).div(r).sqrt()
    alpha = bounded(P.norm(dim=1), longest(step, memory))
    for layer in range(layers):
        wanted = reference.bounded_age(P[layer].numpy(), U[layer].numpy(), rate, memory)
        np.testing.assert_allclose(alpha[layer].numpy(), wanted, rtol=1e-12)
    assert ((alpha > 0) & (alpha <= 1)).all()
    ages = (P * alpha.unsqueeze(1)).norm(dim=1) / step.unsqueeze(1)
    assert (ages <= memory * (1 + 1e-12)).all()
    # In other units of the loss, whose gradients an optimizer of degree 1 steps by, and of P.
    torch.testing.assert_close(bounded(7 * P.norm(dim=1), longest(7 * step, memory)), alpha)


def test_layer_that_does_not_move_is_not_bounded() -> None:
    alpha = bounded(torch.tensor([[1.0, 0.0]]), longest(torch.tensor([0.0]), 5.0))
    assert alpha.tolist() == [[1.0, 1.0]]


def columns(layers: int, rows: int, r: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, rows, r, generator=generator, dtype=torch.float64)


def descents_of(P: torch.Tensor, g: torch.Tensor, U: torch.Tensor, degree: int) -> torch.Tensor:
    return descent(P.norm(dim=1), (g * U).sum(1), U.square().sum(1), degree)


@given(matrices, st.sampled_from([0, 1]), st.integers(0, 2**31 - 3))
def test_descents_and_their_shares_are_the_references(
    shape: tuple[int, int, int], degree: int, seed: int
) -> None:
    layers, m, r = shape
    P, (g, U) = columns(layers, m, r, seed), (columns(layers, 5, r, seed + i) for i in (1, 2))
    found = descents_of(P, g, U, degree)
    lengths = shares(found, degree)
    for layer in range(layers):
        wanted = reference.descent(P[layer].numpy(), g[layer].numpy(), U[layer].numpy(), degree)
        np.testing.assert_allclose(found[layer].numpy(), wanted, rtol=1e-9)
        np.testing.assert_allclose(
            lengths[layer].numpy(), reference.shares(wanted, degree), rtol=1e-9
        )
    # The mean is what K stands for, and a column that does not descend gets nothing.
    torch.testing.assert_close(lengths.mean(-1), torch.ones(layers, dtype=torch.float64))
    descends = found[:, 0] > 0
    some = descends.any(-1, keepdim=True)
    assert torch.equal((lengths > 0) & some, descends)


@given(matrices, st.sampled_from([0, 1]), st.integers(0, 2**31 - 3), st.floats(0.1, 10))
def test_optimal_lengths_do_not_depend_on_those_before_nor_on_units(
    shape: tuple[int, int, int], degree: int, seed: int, unit: float
) -> None:
    """Longer columns have larger gradients of Q, and directions as their degree says."""
    layers, m, r = shape
    P, (g, U) = columns(layers, m, r, seed), (columns(layers, 5, r, seed + i) for i in (1, 2))
    alpha = columns(layers, 1, r, seed + 3).exp()
    found = descents_of(P, g, U, degree)
    moved = descents_of(P * alpha, g * alpha, U * alpha**degree, degree)
    torch.testing.assert_close(moved, found)
    other = descents_of(P, g * unit, U * unit**degree, degree)
    torch.testing.assert_close(shares(other, degree), shares(found, degree))


@pytest.mark.parametrize("degree", [0, 1])
def test_factor_that_is_still_zero_says_nothing_of_its_lengths(degree: int) -> None:
    zero = torch.zeros(1, 2)
    assert not descent(zero, zero, zero, degree).isfinite().all(-2).any()
    assert shares(torch.zeros(1, 2, 2), degree).tolist() == [[1.0, 1.0]]
