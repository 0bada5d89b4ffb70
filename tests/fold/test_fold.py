from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samplers import RANKS, SEEDS, SIDES
from torch import Tensor

from scalora.fold import ROUNDINGS, dense, fold, noise_seed
from scalora.fold.rounding import decode_residual, encode_residual, noise_bits

HALVES = [torch.bfloat16, torch.float16]
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # spacing / binade's upper end


def _problem(
    layers: int, m: int, n: int, k: int, dtype: torch.dtype, size: float = 1e-3
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights and the two factors of their increments, whose entries are about ``size``."""
    weights = [(0.02 * torch.randn(m, n)).to(dtype) for _ in range(layers)]
    wide = torch.promote_types(dtype, torch.float32)
    left, right = torch.randn(layers, m, k, dtype=wide), torch.randn(layers, n, k, dtype=wide)
    return weights, left * size, right


def _options(rounding: str, weights: list[Tensor]) -> dict[str, object]:
    seeds = [noise_seed(0, 0, layer) for layer in range(len(weights))]
    residuals = []
    if rounding == "compensated":
        residuals = [torch.zeros_like(w, dtype=torch.int8) for w in weights]
    return {"rounding": rounding, "seeds": seeds, "residuals": residuals}


def _spacing(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between the representable values around each value."""
    smallest = torch.finfo(dtype).smallest_normal
    return 2.0 ** np.ceil(np.log2(np.maximum(np.abs(values), smallest))) * STEP[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(
    layers=st.integers(1, 3),
    m=SIDES,
    n=SIDES,
    k=RANKS,
    seed=SEEDS,
)
@settings(max_examples=15)
def test_wide_weights_take_the_increment_to_round_off(
    dtype: torch.dtype, rounding: str, layers: int, m: int, n: int, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weights, left, right = _problem(layers, m, n, k, dtype, size=1.0)
    expected = [
        w.double() + sum(torch.outer(a.double(), b.double()) for a, b in zip(P.T, Q.T, strict=True))
        for w, P, Q in zip(weights, left, right, strict=True)
    ]
    fold(weights, left, right, **_options(rounding, weights))
    eps = torch.finfo(dtype).eps
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.double(), value, rtol=0, atol=100 * k * eps)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(
    layers=st.integers(1, 3),
    m=SIDES,
    n=SIDES,
    k=RANKS,
    size=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    seed=SEEDS,
)
@settings(max_examples=30)
def test_half_precision_weights_end_at_a_neighbour_of_the_sum(
    dtype: torch.dtype,
    rounding: str,
    layers: int,
    m: int,
    n: int,
    k: int,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weights, left, right = _problem(layers, m, n, k, dtype, size)
    sums = [
        (w.double() + P.double() @ Q.double().T).numpy()
        for w, P, Q in zip(weights, left, right, strict=True)
    ]
    options = _options(rounding, weights)
    fold(weights, left, right, **options)
    for weight, exact in zip(weights, sums, strict=True):
        blur = 1e-5 * (np.abs(exact) + size)  # the float32 sum may pass a representable value
        below, _ = reference.neighbours(exact - blur, dtype)
        _, above = reference.neighbours(exact + blur, dtype)
        folded = weight.double().numpy()
        assert np.all((folded >= below) & (folded <= above))
        if rounding != "stochastic":
            assert np.all(np.abs(folded - exact) <= (above - below) / 2 + 2 * blur)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_a_zero_increment_changes_no_bit(rounding: str, dtype: torch.dtype) -> None:
    weights, left, right = _problem(2, 64, 50, 3, dtype)
    if dtype in HALVES:  # and among them float16's subnormals
        values = torch.from_numpy(reference.representable(dtype)).to(dtype)
        weights.append(values[: 64 * 50].clone().reshape(64, 50))
        middle = len(values) // 2
        weights.append(values[middle - 1600 : middle + 1600].clone().reshape(64, 50))
        left, right = torch.cat([left, left]), torch.cat([right, right])
    before = [w.clone() for w in weights]
    for count in range(10):
        options = _options(rounding, weights)
        options["seeds"] = [noise_seed(0, count, i) for i in range(len(weights))]
        fold(weights, torch.zeros_like(left), right, **options)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def _accumulate(
    rounding: str, dtype: torch.dtype, times: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Many small increments, one like the other, to weights of 0.01 to 0.04.

    Returns the weight, its residual, the true sum and the start, in float64.
    """
    weight = (torch.randn(96, 64).sign() * (0.01 + 0.03 * torch.rand(96, 64))).to(dtype)
    left, right = torch.full((1, 96, 1), 1e-6), torch.randn(1, 64, 1).abs()
    start = weight.double()
    options = _options(rounding, [weight])
    true = start.clone()
    for count in range(times):
        options["seeds"] = [noise_seed(0, count, 0)]
        fold([weight], left, right, **options)
        true += left[0].double() @ right[0].double().T
    kept = [decode_residual(code, weight).double() for code in options["residuals"]]
    return weight.double(), sum(kept, torch.zeros(())), true, start


def test_stochastic_rounding_accumulates_a_thousand_small_increments_without_bias() -> None:
    weight, _, true, start = _accumulate("stochastic", torch.bfloat16, times=1000)
    error = weight - true
    standard_error = error.std() / error.numel() ** 0.5
    assert error.mean().abs() < 4 * standard_error
    assert standard_error < 0.05 * (true - start).mean()  # the mean says something
    # Its variance is |increment| * spacing per fold, by the two neighbours and their probabilities.
    spacing = torch.from_numpy(_spacing(start.numpy(), torch.bfloat16))
    predicted = ((true - start).abs() * spacing).mean().sqrt()
    assert error.square().mean().sqrt() < 1.3 * predicted


def test_nearest_rounding_loses_nearly_all_of_a_thousand_small_increments() -> None:
    weight, _, true, start = _accumulate("nearest", torch.bfloat16, times=1000)
    arrived = (weight - start).sum() / (true - start).sum()
    assert arrived < 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_compensation_keeps_the_sum_within_one_unit_in_the_last_place(dtype: torch.dtype) -> None:
    weight, residual, true, _ = _accumulate("compensated", dtype, times=1000)
    spacing = _spacing(true.numpy(), dtype)
    assert np.all((weight - true).abs().numpy() <= spacing)
    # With the residual the sum is known much more closely.
    assert np.median((weight + residual - true).abs().numpy() / spacing) < 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_a_residual_is_what_was_cut_to_a_254th_of_a_unit(dtype: torch.dtype) -> None:
    sizes = 2.0 ** torch.arange(-12, 4, dtype=torch.float32)
    exact = sizes[:, None] * (1 + torch.rand(16, 4096))
    exact *= torch.randn_like(exact).sign()
    rounded = exact.to(dtype)
    cut = exact - rounded.float()
    bits = noise_bits(noise_seed(5), 0, cut.numel(), cut.device)
    kept = decode_residual(encode_residual(cut, rounded, bits), rounded)
    _, exponent = torch.frexp(rounded.double())
    part = torch.finfo(dtype).eps * 2.0 ** (exponent - 1) / 254
    error = (kept - cut).double() / part
    assert error.abs().max() <= 1
    assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_compensated_errors_do_not_grow_with_the_number_of_folds(dtype: torch.dtype) -> None:
    weight = (0.02 * torch.randn(32, 24)).to(dtype)
    true, residual = weight.double(), torch.zeros(32, 24, dtype=torch.int8)
    unit = torch.from_numpy(_spacing(weight.double().numpy(), dtype))
    change = 0.004 * unit * torch.rand(32, 24)
    left, right = change.float()[None], torch.eye(24)[None]
    for count in range(4_600):  # up to eight units there and back: stochastic rounding is off by 3
        seeds, sign = [noise_seed(1, count)], 1.0 if count % 1_000 < 500 else -1.0
        fold(
            [weight],
            sign * left,
            right,
            rounding="compensated",
            seeds=seeds,
            residuals=[residual],
        )
        true += sign * left[0].double()
    error = (weight.double() - true) / unit
    once = (true.to(dtype).double() - true) / unit
    assert error.square().mean().sqrt() < 1.2 * once.square().mean().sqrt()


def test_float32_accumulates_a_thousand_small_increments() -> None:
    weight, _, true, _ = _accumulate("nearest", torch.float32, times=1000)
    torch.testing.assert_close(weight, true, rtol=0, atol=1000 * 2.0**-29)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_seed_gives_the_same_bits_and_another_does_not(dtype: torch.dtype) -> None:
    weights, left, right = _problem(3, 40, 30, 2, dtype)
    results = []
    for seed in (0, 0, 1):
        copies = [w.clone() for w in weights]
        seeds = [noise_seed(seed, 7, layer) for layer in range(3)]
        fold(copies, left, right, rounding="stochastic", seeds=seeds)
        results.append(torch.stack(copies))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_layers_draw_different_noise() -> None:
    weights, left, right = _problem(1, 40, 30, 2, torch.bfloat16)
    copies = [weights[0].clone(), weights[0].clone()]
    seeds = [noise_seed(0, 0, 0), noise_seed(0, 0, 1)]
    fold(copies, left.repeat(2, 1, 1), right.repeat(2, 1, 1), rounding="stochastic", seeds=seeds)
    assert not torch.equal(*copies)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_layers_of_one_call_are_folded_as_if_alone(rounding: str, dtype: torch.dtype) -> None:
    weights, left, right = _problem(4, 20, 30, 3, dtype)
    alone = [w.clone() for w in weights]
    together = _options(rounding, weights)
    fold(weights, left, right, **together)
    for i, weight in enumerate(alone):
        options = _options(rounding, [weight])
        options["seeds"] = together["seeds"][i : i + 1]
        fold([weight], left[i : i + 1], right[i : i + 1], **options)
        assert torch.equal(weight, weights[i])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES)
def test_result_does_not_depend_on_the_chunks_it_is_computed_in(
    rounding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, left, right = _problem(1, 37, 30, 2, dtype)
    # Few bits each, so that no order of summation rounds.
    left, right = (left * 1e4).round() * 2.0**-14, right.round()
    results = []
    for elements in (1 << 20, 100, 1):
        monkeypatch.setattr(dense, "_ELEMENTS_AT_ONCE", elements)
        copies = [w.clone() for w in weights]
        fold(copies, left, right, **_options(rounding, copies))
        results.append(copies[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_transposed_weight_gets_the_same_values(rounding: str, dtype: torch.dtype) -> None:
    weights, left, right = _problem(1, 40, 30, 2, dtype)
    transposed = [weights[0].T.contiguous().T]
    fold(weights, left, right, **_options(rounding, weights))
    fold(transposed, left, right, **_options(rounding, transposed))
    if dtype is torch.float32:
        torch.testing.assert_close(transposed[0], weights[0], rtol=1e-6, atol=1e-9)
    else:
        assert (transposed[0] == weights[0]).double().mean() > 0.99


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_folding_is_an_in_place_write_that_autograd_can_see(
    rounding: str, dtype: torch.dtype
) -> None:
    # Re-basing decides from the version which layers have changed.
    weights, left, right = _problem(2, 20, 30, 3, dtype)
    versions = [w._version for w in weights]
    fold(weights, left, right, **_options(rounding, weights))
    assert all(w._version > version for w, version in zip(weights, versions, strict=True))


# On a GPU: one kernel for all layers


def _launches(layers: int) -> dict[str, int]:
    weights, left, right = _problem(layers, 256, 192, 8, torch.bfloat16)
    weights = [w.cuda() for w in weights]
    left, right = left.cuda(), right.cuda()
    options = _options("stochastic", weights)
    fold(weights, left, right, **options)  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fold(weights, left, right, **options)
        torch.cuda.synchronize()
    kernels: dict[str, int] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name] = kernels.get(event.name, 0) + 1
    return kernels


@pytest.mark.gpu
def test_one_kernel_launch_folds_many_layers() -> None:
    few, many = _launches(2), _launches(30)
    assert sum(count for name, count in many.items() if "fold_kernel" in name) == 1
    assert sum(many.values()) == sum(few.values())


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(256, 192), (100, 77), (1, 5)])
def test_cuda_folds_as_the_cpu_does(
    rounding: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weights, left, right = _problem(5, *shape, 8, dtype)
    on_gpu = [w.cuda() for w in weights]
    fold(weights, left, right, **_options(rounding, weights))
    fold(on_gpu, left.cuda(), right.cuda(), **_options(rounding, on_gpu))
    expected, folded = torch.stack(weights), torch.stack(on_gpu).cpu()
    if dtype not in HALVES:
        torch.testing.assert_close(folded, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
        return
    # The same bits, unless the two float32 sums straddle a rounding boundary.
    assert (folded == expected).double().mean() > 0.99
    off = (folded.double() - expected.double()).abs().numpy()
    assert np.all(off <= _spacing(expected.double().numpy(), dtype))


@pytest.mark.gpu
def test_cuda_folds_float32_increments_into_float64_weights() -> None:
    weights, left, right = _problem(2, 20, 30, 3, torch.float64)
    on_gpu = [w.cuda() for w in weights]
    fold(weights, left.float(), right.float())
    fold(on_gpu, left.float().cuda(), right.float().cuda())
    torch.testing.assert_close(torch.stack(on_gpu).cpu(), torch.stack(weights))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_finite_weight_stays_finite(dtype: torch.dtype, rounding: str) -> None:
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest, -largest, torch.inf, torch.nan]]).to(dtype)
    change = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]]).mT * largest * torch.finfo(dtype).eps / 8
    options = _options(rounding, [weight])
    for _ in range(3):
        fold([weight], torch.ones(1, 1, 1), change, **options)
    assert weight[0, :2].tolist() == [largest, -largest]
    assert weight[0, 2] == torch.inf and weight[0, 3].isnan()
