"""The Triton kernel against the plain fold: on a GPU, and in Triton's interpreter without one.

conftest.py turns the interpreter on where there is no GPU; it has to be on before scalora's kernels
are defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from scalora.fold import ROUNDINGS, fold, noise_seed
from scalora.fold.rounding import decode_residual

triton = pytest.importorskip("triton")

HALVES = [torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set"),
        id="interpreted",
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
SHAPES = [(64, 128), (1, 1), (65, 129), (70, 300), (3, 257), (200, 7)]  # blocks are 64 x 128


@pytest.fixture(autouse=True)
def _interpreter_converts_bfloat16_as_hardware_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds to nearest, and keeps subnormals: the interpreter itself does neither."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl
    bfloat16, float32 = triton.language.bfloat16, triton.language.float32

    def cast_impl(self, source, target):
        conversion = source.dtype.scalar, target.scalar
        if conversion not in ((bfloat16, float32), (float32, bfloat16)):
            return original(self, source, target)
        data = torch.from_numpy(np.ascontiguousarray(source.data))
        if conversion[0] == bfloat16:
            return TensorHandle(data.view(torch.bfloat16).float().numpy(), target.scalar)
        return TensorHandle(data.bfloat16().view(torch.uint16).numpy(), target.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def _fold_fused(*args: object, **options: object) -> None:
    from scalora.fold.fused import fold_fused

    fold_fused(*args, **options)


def _problem(
    layers: int, m: int, n: int, k: int, dtype: torch.dtype, size: float = 1e-3
) -> tuple[list[Tensor], Tensor, Tensor]:
    weights = [(0.02 * torch.randn(m, n)).to(dtype) for _ in range(layers)]
    return weights, size * torch.randn(layers, m, k), torch.randn(layers, n, k)


def _options(rounding: str, weights: list[Tensor]) -> dict[str, object]:
    seeds = [noise_seed(3, 1, layer) for layer in range(len(weights))]
    residuals = []
    if rounding == "compensated" and weights[0].dtype in HALVES:
        seed = torch.Generator().manual_seed(0)
        residuals = [
            torch.randint(-127, 128, w.shape, dtype=torch.int8, generator=seed) for w in weights
        ]
    return {"rounding": rounding, "seeds": seeds, "residuals": residuals}


def _both(
    weights: list[Tensor],
    left: Tensor,
    right: Tensor,
    rounding: str,
    device: str,
    scale: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel makes of the weights (and residuals), and what the plain fold makes.

    Each a stack of the weights, and one of the residuals where there are some.
    """
    results = []
    for where, run in ((device, _fold_fused), ("cpu", fold)):
        options = _options(rounding, weights)
        copies = [w.to(where, copy=True) for w in weights]
        options["residuals"] = [residual.to(where) for residual in options["residuals"]]
        run(copies, left.to(where), right.to(where), scale=scale, **options)
        stacks = [torch.stack(copies).cpu()]
        if options["residuals"]:
            stacks.append(torch.stack(options["residuals"]).cpu())
        results.append(stacks)
    return results[0], results[1]


def _assert_alike(fused: list[Tensor], plain: list[Tensor]) -> None:
    """Equal bits, but for the rare sums of float32 that another order rounds otherwise."""
    if plain[0].dtype is torch.float32:
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-7)
        return
    for one, other, share in zip(fused, plain, (0.01, 0.05), strict=False):
        assert (one != other).sum() <= max(2, share * other.numel())
    grid = reference.representable(plain[0].dtype)
    places = [np.searchsorted(grid, stacks[0].double().numpy()) for stacks in (fused, plain)]
    assert np.all(np.abs(places[0] - places[1]) <= 1)
    if len(plain) == 2:  # with its residual, the sum agrees to the residual's own precision
        sums = [weight.double() + decode_residual(code, weight) for weight, code in (fused, plain)]
        part = torch.finfo(plain[0].dtype).eps / 254
        torch.testing.assert_close(*sums, rtol=part, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_folds_as_the_plain_code_does(
    shape: tuple[int, int], rounding: str, dtype: torch.dtype, device: str
) -> None:
    weights, left, right = _problem(3, *shape, 4, dtype)
    fused, plain = _both(weights, left, right, rounding, device)
    assert not torch.equal(plain[0], torch.stack(weights))
    _assert_alike(fused, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 15, 16, 17, 24, 130])
def test_kernel_takes_every_rank(rank: int, dtype: torch.dtype, device: str) -> None:
    weights, left, right = _problem(2, 66, 40, rank, dtype)
    _assert_alike(*_both(weights, left, right, "stochastic", device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_bits_are_those_of_the_plain_code(dtype: torch.dtype, device: str) -> None:
    # Few bits in every number, so that no order of summation rounds: then not one may differ.
    weights, left, right = _problem(4, 70, 130, 3, dtype)
    left, right = (left * 1e4).round() * 2.0**-16, right.round()
    [fused], [plain] = _both(weights, left, right, "stochastic", device)
    assert torch.equal(fused, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first_row", [1, 40])
def test_rows_of_a_weight_are_rounded_as_they_are_in_the_whole(first_row: int, device: str) -> None:
    weights, left, right = _problem(2, 70, 130, 3, torch.bfloat16)
    left, right = (left * 1e4).round() * 2.0**-16, right.round()
    _, [plain] = _both(weights, left, right, "stochastic", device)
    rows = [weight[first_row:].clone().to(device) for weight in weights]
    _fold_fused(
        rows,
        left[:, first_row:].to(device),
        right.to(device),
        **_options("stochastic", weights),
        first_row=first_row,
    )
    assert torch.equal(torch.stack(rows).cpu(), plain[:, first_row:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_scale_is_a_factor_of_the_increment(dtype: torch.dtype, device: str) -> None:
    weights, left, right = _problem(2, 70, 130, 3, dtype)
    left, right = (left * 1e4).round() * 2.0**-16, right.round()
    options = _options("stochastic", weights)
    [scaled], [plain] = _both(weights, left, right, "stochastic", device, scale=4.0)
    copies = [weight.clone() for weight in weights]
    fold(copies, 4 * left, right, **options)
    assert torch.equal(plain, torch.stack(copies))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-7 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what overflows
def test_kernel_rounds_every_magnitude_as_the_plain_code_does(
    dtype: torch.dtype, rounding: str, device: str
) -> None:
    # From float16's subnormals to beyond the largest.  High and low digits come in two columns
    # of few bits each, so that no order of summation rounds, nor a GPU's tf32.
    exponents = torch.randint(-27, 17, (1, 64, 1)) - torch.tensor([0, 9])
    left = (128 * torch.randn(1, 64, 2)).round() / 128 * 2.0**exponents
    right = torch.randn(1, 128, 1).sign() * 2.0 ** torch.randint(-1, 2, (1, 128, 1))
    right = right.repeat(1, 1, 2)
    fused, plain = _both([torch.zeros(64, 128, dtype=dtype)], left, right, rounding, device)
    torch.testing.assert_close(fused, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_zero_increment_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    values = torch.from_numpy(reference.representable(dtype)).to(dtype)
    values = values[: len(values) // 256 * 256].reshape(-1, 256)
    left, right = torch.zeros(1, len(values), 2), torch.randn(1, 256, 2)
    [fused], _ = _both([values], left, right, "stochastic", device)
    assert torch.equal(fused[0], values)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_stays_so_and_touches_no_other_element(device: str) -> None:
    weights, left, right = _problem(1, 66, 40, 2, torch.bfloat16)
    weights[0][1, 2], weights[0][65, 39] = torch.inf, torch.nan
    [fused], [plain] = _both(weights, left, right, "stochastic", device)
    torch.testing.assert_close(fused.isfinite(), weights[0].isfinite()[None])
    torch.testing.assert_close(fused, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_kernel_writes_are_seen_by_autograds_version_counter(
    dtype: torch.dtype, device: str
) -> None:
    # Re-basing decides from the version which layers have changed.
    weights, left, right = _problem(2, 20, 30, 3, dtype)
    weights = [w.to(device) for w in weights]
    versions = [w._version for w in weights]
    options = _options("stochastic", weights)
    _fold_fused(weights, left.to(device), right.to(device), **options)
    assert all(w._version > version for w, version in zip(weights, versions, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_outside_a_weight_is_written(device: str) -> None:
    store = torch.full((3, 70, 130), 7.0, dtype=torch.bfloat16, device=device)
    left, right = torch.randn(1, 70, 2, device=device), torch.randn(1, 130, 2, device=device)
    options = _options("stochastic", [store[1]])
    _fold_fused([store[1]], left, right, **options)
    assert torch.all(store[[0, 2]] == 7.0)
    assert not torch.all(store[1] == 7.0)


_COMPILE = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scalora.fold import fused

kernel = fused._fold_kernel
kinds = {"weight_addresses": "*i64", "residual_addresses": "*i64", "left": "*fp32",
         "right": "*fp32", "rows": "i32", "columns": "i32", "rank": "i32",
         "first_row": "i32", "scale": "fp32"}
for case in sys.argv[1:]:
    name, mode, capability = case.split(":")
    element, half = getattr(tl, name), name != "float32"
    kinds["seeds"] = "*i32" if half else "*i64"
    values = {"element": element, "mode": fused._MODES[mode],
              "precision": "tf32x3" if half else "ieee", "block_rows": fused._BLOCK_ROWS,
              "block_columns": fused._BLOCK_COLUMNS, "block_rank": 16, "aligned": True}
    signature, constants = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if parameter.is_constexpr else kinds[name]
        if parameter.is_constexpr:
            constants[place,] = values[name]
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(capability), 32))
    assert "st.global" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.uname().machine == "x86_64"),
    reason="Triton brings its compiler for this platform only",
)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["bfloat16:stochastic:90", "float16:compensated:80"], id="main"),
        pytest.param(
            [
                f"{name}:{mode}:{capability}"
                for name in ("float32", "bfloat16", "float16")
                for mode in (ROUNDINGS if name != "float32" else ("nearest",))
                for capability in (80, 90, 100)
            ],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_kernel_compiles_for_nvidia_gpus_without_having_one(
    cases: list[str], tmp_path: Path
) -> None:
    # In a process of its own: here the interpreter has taken the compiler's place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, *cases],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "compiled"


def test_a_kernel_that_was_not_launched_leaves_no_weight_marked_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # From versions, re-basing tells which layers have taken their increment before it failed.
    from scalora.fold import fused

    weights, left, right = _problem(2, 4, 5, 2, torch.bfloat16)
    monkeypatch.setattr(fused, "_to_device", _out_of_memory)
    versions = [w._version for w in weights]
    with pytest.raises(MemoryError):
        _fold_fused(weights, left, right, **_options("stochastic", weights))
    assert [w._version for w in weights] == versions


def _out_of_memory(*args: object) -> None:
    raise MemoryError


def test_fake_weights_are_marked_as_written() -> None:
    from torch._subclasses import FakeTensorMode

    weights, left, right = _problem(2, 4, 5, 2, torch.bfloat16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(w) for w in weights]
        versions = [w._version for w in fakes]
        _fold_fused(
            fakes, mode.from_tensor(left), mode.from_tensor(right), **_options("nearest", weights)
        )
    assert all(w._version > version for w, version in zip(fakes, versions, strict=True))
