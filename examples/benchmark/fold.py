"""The fold of a Llama-8B's 224 LoRA layers: memory bandwidth against a plain copy's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.benchmark.table import markdown
from scalora.fold import fold, noise_seed

_LLAMA_8B_SHAPES = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
_SMALL_SHAPES = {(384, 384): 24, (1536, 384): 6, (384, 1536): 6}
_RANK, _REPEATS = 8, 10


def run(device: torch.device) -> str:
    """Return the table of all shapes; away from a GPU of smaller ones, in float32."""
    small = device.type != "cuda"
    dtype = torch.float32 if small else torch.bfloat16
    peak = copy_rate(dtype, device)
    header = ["layers", "ms", "GB/s", "of a copy's"]
    note = (
        f"{dtype}, r = {_RANK}; each weight read and written once; a copy: {peak / 1e9:.0f} GB/s."
    )
    return markdown(header, bandwidths(device, dtype, peak, small=small)) + "\n\n" + note


def bandwidths(
    device: torch.device, dtype: torch.dtype, peak: float, *, small: bool
) -> list[list[str]]:
    """Return for each shape: layers, milliseconds, GB per second, share of a copy's.

    Args:
        device: where to fold.
        dtype: of the weights.
        peak: bytes per second of a copy; `copy_rate`.
        small: MiniLM-L6's shapes instead of a Llama-8B's.
    """
    rows = []
    total_bytes, total_seconds = 0, 0.0
    shapes = _SMALL_SHAPES if small else _LLAMA_8B_SHAPES
    for (m, n), layers in shapes.items():
        weights = [torch.randn(m, n, device=device).to(dtype) for _ in range(layers)]
        left = 1e-3 * torch.randn(layers, m, _RANK, device=device)
        right = torch.randn(layers, n, _RANK, device=device)
        seeds = [noise_seed(0, 0, layer) for layer in range(layers)]
        seconds = _seconds(_fold_call(weights, left, right, seeds), device)
        moved = 2 * sum(weight.nbytes for weight in weights)
        total_bytes, total_seconds = total_bytes + moved, total_seconds + seconds
        rows.append(_row(f"{layers} x ({m}, {n})", moved, seconds, peak))
        del weights
    rows.append(_row(f"all {sum(shapes.values())}", total_bytes, total_seconds, peak))
    return rows


def copy_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.ones(1 << (29 if device.type == "cuda" else 24), dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _fold_call(
    weights: list[Tensor], left: Tensor, right: Tensor, seeds: list[int]
) -> Callable[[], None]:
    return lambda: fold(weights, left, right, seeds=seeds)


def _row(name: str, moved: int, seconds: float, peak: float) -> list[str]:
    rate = moved / seconds
    return [name, f"{1e3 * seconds:.2f}", f"{rate / 1e9:.0f}", f"{100 * rate / peak:.0f} %"]


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median of several calls, after two that are not counted."""
    times = []
    for _ in range(_REPEATS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[_REPEATS // 2]
