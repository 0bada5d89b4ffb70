"""Codes in blocks: decoded, encoded and transferred as the loops of the reference say."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalora.moments.blockwise import BLOCK, decode, encode, transfer_codes
from scalora.moments.history import transfer

SHAPES = [(600, 3), (128, 2), (3, 256), (1, 1), (5, 2, 3, 3), (2, 300), (257, 1)]
ROUND_OFF = 4 * 2.0**-24  # of a value in float32, a few operations deep


def dynamic_map(signed: bool) -> Tensor:
    """bitsandbytes' map: seven decades, twice the levels in each that it has in the one below."""
    positive = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        positive += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
    negative = [-level for level in positive if 0 < level < 1] if signed else []
    return torch.tensor(sorted(positive + negative))


def sample(seed: int, shape: tuple[int, ...], signed: bool, exponent: int) -> Tensor:
    """Values over many decades, zeros and one block of nothing but zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= 10.0 ** (torch.randint(-9, 1, shape, generator=generator) + exponent)
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values.flatten(1)[0, :BLOCK] = 0
    return values if signed else values.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes_own(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@given(
    st.integers(0, 2**20),
    st.sampled_from(SHAPES),
    st.integers(1, 2),
    st.booleans(),
    st.integers(-25, 20),
)
def test_codes_are_those_of_the_reference(
    seed: int, shape: tuple[int, ...], axes: int, signed: bool, exponent: int
) -> None:
    level_map = dynamic_map(signed)
    state = sample(seed, ((2,), (2, 2))[axes - 1] + shape, signed, exponent)
    codes, absmax = encode(state, level_map, axes)
    assert codes.dtype == torch.uint8 and codes.shape == state.shape
    restored = decode(codes, absmax, level_map)
    levels = level_map.double().numpy()
    singles = [t.reshape(-1, *t.shape[axes:]) for t in (state, codes, absmax, restored)]
    for one_state, one_codes, one_absmax, one_restored in zip(*singles, strict=True):
        scales = reference.block_scales(one_state.double().numpy(), levels)
        np.testing.assert_allclose(one_absmax.double(), scales, rtol=ROUND_OFF)
        exact = reference.decoded(one_codes.numpy(), one_absmax.double().numpy(), levels)
        np.testing.assert_allclose(one_restored.double(), exact, rtol=ROUND_OFF)
        for i, value in enumerate(one_state.flatten().double().tolist()):
            scale = one_absmax[i // BLOCK].item()
            if scale == 0:
                assert value == 0 and one_restored.flatten()[i] == 0
                continue
            distances = np.abs(levels - value / scale)
            chosen = distances[one_codes.flatten()[i]]
            assert chosen <= distances.min() + ROUND_OFF * abs(value / scale)


@given(
    st.integers(0, 2**20),
    st.sampled_from([(600, 3), (3, 256), (5, 2, 3, 3), (2, 300)]),
    st.integers(1, 2),
    st.booleans(),
    st.floats(0, 3),
)
def test_a_transfer_adds_at_most_half_a_step(
    seed: int, shape: tuple[int, ...], degree: int, last_axis: bool, spread: float
) -> None:
    signed, rank_axis = degree == 1, 2 if last_axis else 1
    level_map = dynamic_map(signed)
    levels = level_map.double().numpy()
    codes, absmax = encode(sample(seed, (2, *shape), signed, 0), level_map, 1)
    factor = 10.0 ** (spread * torch.randn(2, shape[rank_axis - 1], dtype=torch.float64))
    new_codes, new_absmax = transfer_codes(codes, absmax, level_map, factor, degree, rank_axis)
    for layer in range(2):
        old = reference.decoded(codes[layer].numpy(), absmax[layer].numpy(), levels)
        wanted = reference.transferred(old, factor[layer].numpy(), degree, rank_axis - 1)
        found = reference.decoded(new_codes[layer].numpy(), new_absmax[layer].numpy(), levels)
        step = reference.quantization_gaps(wanted, new_absmax[layer].numpy(), levels)
        assert np.all(np.abs(found - wanted) <= step / 2 + ROUND_OFF * np.abs(wanted))


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_scaled_alike_keep_their_codes(signed: bool) -> None:
    # A row of n = 512 is two blocks.  Also a block whose largest element is negative, which the map
    # does not reach: its codes would creep towards zero if absmax were the largest magnitude.
    level_map = dynamic_map(signed)
    state = torch.randn(2, 4, 512) if signed else torch.rand(2, 4, 512)
    codes, absmax = encode(state, level_map, 1)
    if signed:
        assert (codes == 0).any() and (codes == 255).any()
    factor = torch.exp(torch.randn(2, 4, dtype=torch.float64))
    new_codes, new_absmax = codes, absmax
    for _ in range(10):
        new_codes, new_absmax = transfer_codes(new_codes, new_absmax, level_map, factor, 1, 1)
    assert torch.equal(new_codes, codes)
    expected = absmax * factor.pow(10).repeat_interleave(2, 1)
    torch.testing.assert_close(new_absmax.double(), expected.double(), rtol=10 * ROUND_OFF, atol=0)


def test_a_factor_of_one_changes_no_bit() -> None:
    level_map = dynamic_map(True)
    codes, absmax = encode(torch.randn(3, 100, 7), level_map, 1)
    ones = torch.ones(3, 7, dtype=torch.float64)
    new_codes, new_absmax = transfer_codes(codes, absmax, level_map, ones, 1, 2)
    assert torch.equal(new_codes, codes) and torch.equal(new_absmax, absmax)


@pytest.mark.parametrize("code", [0, 127, 128, 255])
def test_blocks_of_zeros_stay_zero_whatever_their_codes(code: int) -> None:
    # bitsandbytes starts from codes 0, which is not the level 0 of the signed map.
    level_map = dynamic_map(True)
    codes = torch.full((1, 100, 4), code, dtype=torch.uint8)
    factor = torch.tensor([[0.0, 1e3, 1.0, 1e-3]], dtype=torch.float64)
    moved = transfer_codes(codes, torch.zeros(1, 2), level_map, factor, 2, 2)
    assert torch.equal(decode(*moved, level_map), torch.zeros(1, 100, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_own_blocks_scale_alone(value: float) -> None:
    level_map = dynamic_map(True)
    state = torch.randn(1, 100, 8)
    codes, absmax = encode(state, level_map, 1)
    factor = torch.ones(2, 8, dtype=torch.float64)
    factor[1, 3] = value
    both = codes.expand(2, 100, 8), absmax.expand(2, 4)
    new_codes, new_absmax = transfer_codes(*both, level_map, factor, 1, 2)
    assert new_absmax.isfinite().all(1).tolist() == [True, False]
    assert torch.equal(new_codes[0], codes[0]) and torch.equal(new_absmax[0], absmax[0])


def test_two_averages_in_one_tensor_are_two_states() -> None:
    level_map = dynamic_map(True)
    state = torch.randn(3, 2, 70, 5)
    codes, absmax = encode(state, level_map, 2)
    assert absmax.shape == (3, 2, 2)
    factor = torch.exp(torch.randn(3, 5, dtype=torch.float64))
    together = transfer_codes(codes, absmax, level_map, factor, 1, 3)
    for i in range(2):
        alone = transfer_codes(codes[:, i], absmax[:, i], level_map, factor, 1, 2)
        assert torch.equal(together[0][:, i], alone[0]) and torch.equal(together[1][:, i], alone[1])
    exact = transfer(decode(codes, absmax, level_map), factor, 1, 3)
    assert not torch.equal(decode(*together, level_map), exact)  # blocks cross columns: rounded
