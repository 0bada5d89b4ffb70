from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from scalora.fold import noise_bits, noise_seed, round_stochastically

HALVES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
FLOAT32_TINY = 2.0**-149


def _rounded(value: float, dtype: torch.dtype, count: int, seed: int = 1) -> tuple[float, Tensor]:
    """``value`` as float32 holds it, and that rounded ``count`` times."""
    values = torch.full((count,), value)
    result = round_stochastically(values, dtype, noise_bits(seed, 0, count, CPU))
    assert result.dtype == dtype
    return float(values[0]), result.double()


float32_values = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-(2.0**-13), 2.0**-13, width=32),  # around float16's subnormals
    st.floats(-1.0, 1.0, width=32),
)


@pytest.mark.parametrize("dtype", HALVES)
@given(st.lists(float32_values, min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_result_is_one_of_the_two_neighbours(
    dtype: torch.dtype, values: list[float], seed: int
) -> None:
    value = torch.tensor(values)
    bits = noise_bits(seed, 0, len(values), CPU)
    rounded = round_stochastically(value, dtype, bits).double().numpy()
    below, above = reference.neighbours(value.double().numpy(), dtype)
    assert np.all((rounded == below) | (rounded == above))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_values_stay_whatever_the_noise(dtype: torch.dtype, seed: int) -> None:
    exact = torch.from_numpy(reference.representable(dtype)).float()
    for first in range(0, 40 * len(exact), len(exact)):
        bits = noise_bits(seed, first, len(exact), CPU)
        assert torch.equal(round_stochastically(exact, dtype, bits).float(), exact)
    for extreme in (0, -1, 2**31 - 1, -(2**31)):
        bits = torch.full((len(exact),), extreme, dtype=torch.int32)
        assert torch.equal(round_stochastically(exact, dtype, bits).float(), exact)


UNBIASED = [
    0.02 + 1e-5,
    -0.02 - 1e-5,
    1.0 - 2.0**-13,  # the step doubles at a power of two: below,
    1.0 + 2.0**-12,  # above,
    -1.0 + 2.0**-14,
    3.1415927,
    60000.3,
]
UNBIASED_SUBNORMAL = [
    1e-6,  # between subnormals of float16
    -1e-6,
    3e-8,  # below the smallest
    -1e-9,
    2.0**-14 - 2.0**-26,  # between the largest subnormal and the smallest normal value
    2.0**-14 + 2.0**-26,
    -(2.0**-14) + 2.0**-27,
]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in HALVES for value in UNBIASED]
    + [(torch.float16, value) for value in UNBIASED_SUBNORMAL],
)
def test_expectation_is_the_value(dtype: torch.dtype, value: float) -> None:
    value, rounded = _rounded(value, dtype, count=200_000)
    (below,), (above,) = reference.neighbours(np.array([value]), dtype)
    assert below < value < above
    up = (value - below) / (above - below)
    standard_error = math.sqrt(up * (1 - up) / len(rounded))
    share = float((rounded == above).double().mean())
    assert abs(share - up) < 4.5 * standard_error


@pytest.mark.parametrize("dtype", HALVES)
def test_finite_values_stay_finite_up_to_the_largest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest, torch.finfo(torch.float32).max]).repeat(10_000)
    beyond = torch.cat([beyond, torch.nextafter(beyond, torch.zeros(()))])
    bits = noise_bits(3, 0, len(beyond), CPU)
    for sign in (1, -1):
        rounded = round_stochastically(sign * beyond, dtype, bits)
        assert torch.all(rounded.isfinite())
        assert torch.all(rounded.sign() == sign)


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan_pass(dtype: torch.dtype) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    rounded = round_stochastically(values, dtype, noise_bits(4, 0, len(values), CPU))
    torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


def test_bfloat16_keeps_float32s_subnormals_unbiased() -> None:
    step = 2.0**-133  # bfloat16's smallest
    value, rounded = _rounded(0.25 * step, torch.bfloat16, count=100_000)
    assert value > FLOAT32_TINY
    assert float((rounded == step).double().mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_noise_is_taken_in_the_order_of_the_elements(shape: tuple[int, ...]) -> None:
    values, bits = torch.randn(6), noise_bits(5, 0, 6, CPU)
    flat = round_stochastically(values, torch.bfloat16, bits)
    shaped = round_stochastically(values.reshape(shape), torch.bfloat16, bits)
    assert torch.equal(shaped, flat.reshape(shape))


# The noise


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**33), st.integers(1, 20))
def test_noise_is_its_reference(seed: int, first: int, count: int) -> None:
    bits = noise_bits(seed, first, count, CPU)
    assert bits.dtype == torch.int32
    expected = [reference.noise_word(seed, first + i) for i in range(count)]
    assert [int(word) % 2**32 for word in bits] == expected


def test_noise_does_not_depend_on_where_a_weight_is_cut() -> None:
    whole = noise_bits(7, 0, 1000, CPU)
    parts = [noise_bits(7, first, 100, CPU) for first in range(0, 1000, 100)]
    assert torch.equal(torch.cat(parts), whole)


def test_noise_is_the_same_on_every_machine() -> None:
    words = [-1859191561, 1084875187, -455360105, -654965191]
    assert noise_bits(12345, 0, 4, CPU).tolist() == words
    assert noise_seed(0, 1, 2) == 4278288800
    assert noise_seed(42, 1000, 223) == 3759287349
    assert noise_seed(-1) == 2149658750


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_every_bit_is_set_half_of_the_time(seed: int) -> None:
    count = 1 << 16
    bits = noise_bits(seed, 0, count, CPU)
    shares = torch.stack([(bits >> place & 1).double().mean() for place in range(32)])
    assert torch.all((shares - 0.5).abs() < 4.5 * 0.5 / math.sqrt(count))


@pytest.mark.parametrize("places", [range(8), range(8, 16), range(5, 13), range(24, 32)])
def test_bytes_are_uniform(places: range) -> None:
    bits = noise_bits(9, 0, 1 << 17, CPU)
    counts = torch.bincount(bits >> places[0] & 0xFF, minlength=256)
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_one_elements_noise_over_the_rebasings_is_uniform_and_uncorrelated() -> None:
    count = 1 << 14
    words = [reference.noise_word(noise_seed(0, step, 5), 777) & 0xFFFF for step in range(count)]
    uniform = (np.array(words) + 0.5) / 2**16
    assert abs(uniform.mean() - 0.5) < 4.5 / math.sqrt(12 * count)
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_noise_of_another_seed_step_or_layer_is_another(other: tuple[int, int, int]) -> None:
    count = 1 << 16
    one = noise_bits(noise_seed(0, 0, 0), 0, count, CPU) & 0xFFFF
    two = noise_bits(noise_seed(*other), 0, count, CPU) & 0xFFFF
    correlation = float(torch.corrcoef(torch.stack([one, two]).double())[0, 1])
    assert abs(correlation) < 4.5 / math.sqrt(count)


def test_seeds_of_steps_and_layers_do_not_collide() -> None:
    seeds = {noise_seed(0, step, layer) for step in range(200) for layer in range(50)}
    assert len(seeds) >= 10_000 - 2  # a chance collision among 2^32 is possible
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert noise_seed(0, 1, 2) != noise_seed(0, 2, 1)
