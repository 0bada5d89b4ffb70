"""The Triton solver of non-negative problems: on a GPU, and in Triton's interpreter without one.

conftest.py turns the interpreter on where there is no GPU; it has to be on before scalora's kernels
are defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.optimize import nnls
from test_nonnegative import KINDS, _least_squares, _normal_equations, _residual
from torch import Tensor

pytest.importorskip("triton")

EPS = torch.finfo(torch.float64).eps
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not set"
        ),
        id="interpreted",
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def _solved(H: Tensor, lam: Tensor, device: str) -> Tensor:
    from scalora.scaling.nonnegative_kernel import launch

    k = lam.shape[-1]
    arguments = H.to(device), lam.to(device), 8 * k * EPS, 16 * EPS, 0.995, 40
    return launch(*arguments).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind, k", [("generic", 1), *((kind, 3) for kind in KINDS)])
def test_kernel_reaches_the_residual_of_scipys_nnls(kind: str, k: int, device: str) -> None:
    A, b = _least_squares(k, kind, rows=2 if kind == "opposite" else 5, k=k)
    H, lam = _normal_equations(A, b)
    [x] = _solved(H[None], lam[None], device)
    expected, _ = nnls(A.numpy(), b.numpy(), maxiter=10_000)
    assert torch.all(x >= 0)
    best = _residual(A, b, torch.from_numpy(expected))
    assert _residual(A, b, x) <= best + 1e-9 * float(b.square().sum())


@pytest.mark.parametrize("device", DEVICES)
def test_every_problem_of_a_launch_is_solved_as_if_alone(device: str) -> None:
    equations = [_normal_equations(*_least_squares(seed, "generic", 7, 2)) for seed in range(2)]
    H, lam = (torch.stack(part) for part in zip(*equations, strict=True))
    together = _solved(H, lam, device)
    for i in range(2):
        assert torch.equal(together[i : i + 1], _solved(H[i : i + 1], lam[i : i + 1], device))


@pytest.mark.parametrize("device", DEVICES)
def test_problem_that_is_not_finite_leaves_the_others_alone(device: str) -> None:
    H, lam = _normal_equations(*_least_squares(0, "generic", 7, 2))
    broken = torch.full_like(H, torch.nan)
    found = _solved(torch.stack([broken, H]), torch.stack([lam, lam]), device)
    assert torch.equal(found[1:], _solved(H[None], lam[None], device))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4, 16, 64, 80])  # 80 is more than the kernel takes
def test_gpu_solutions_are_those_of_the_cpu(k: int) -> None:
    from scalora.scaling.nonnegative import minimize_nonnegative

    equations = [_normal_equations(*_least_squares(seed, "generic", 90, k)) for seed in range(5)]
    H, lam = (torch.stack(part) for part in zip(*equations, strict=True))
    found = minimize_nonnegative(H.cuda(), lam.cuda()).cpu()
    torch.testing.assert_close(found, minimize_nonnegative(H, lam), rtol=1e-9, atol=1e-11)


_COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scalora.scaling import nonnegative_kernel

kernel = nonnegative_kernel._minimize_kernel
kinds = {"matrices": "*fp64", "vectors": "*fp64", "solutions": "*fp64", "k": "i32", "ridge": "fp32",
         "tolerance": "fp32", "to_boundary": "fp32", "iterations": "i32"}
for case in sys.argv[1:]:
    size, capability = map(int, case.split(":"))
    signature, constants = {}, {}
    for place, parameter in enumerate(kernel.params):
        signature[parameter.name] = "constexpr" if parameter.is_constexpr else kinds[parameter.name]
        if parameter.is_constexpr:
            constants[place,] = size
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target, {"num_warps": nonnegative_kernel.warps(size)})
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
        pytest.param(["16:90"], id="main"),
        pytest.param(
            [f"{size}:{capability}" for size in (2, 32, 64) for capability in (80, 100)],
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
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, *cases],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout == "compiled\n", done.stderr[-2000:]
