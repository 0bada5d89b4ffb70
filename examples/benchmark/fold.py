"""The fold of a Llama-8B's 224 LoRA layers: memory bandwidth and kernel launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import scalora
from examples.benchmark.table import markdown
from scalora.fold import fold, noise_seed
from scalora.options import Rule

_LLAMA_8B_SHAPES = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
_SMALL_SHAPES = {(384, 384): 24, (1536, 384): 6, (384, 1536): 6}
_RANK, _REPEATS = 8, 10


def run(device: torch.device) -> str:
    """Fold bandwidth against a plain copy's, then launches a step for 8, 16 and 32 layers."""
    shapes = _LLAMA_8B_SHAPES if device.type == "cuda" else _SMALL_SHAPES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tables = [_bandwidth(shapes, dtype, device)]
    if device.type == "cuda":
        tables.append(_launches(device))
    return "\n\n".join(tables)


def _bandwidth(shapes: dict[tuple[int, int], int], dtype: torch.dtype, device: torch.device) -> str:
    peak = _copy_rate(dtype, device)
    rows = []
    total_bytes, total_seconds = 0, 0.0
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
    header = ["layers", "ms", "GB/s", "of a copy's"]
    note = (
        f"{dtype}, r = {_RANK}; each weight read and written once; a copy: {peak / 1e9:.0f} GB/s."
    )
    return markdown(header, rows) + "\n\n" + note


def _copy_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
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
    """Median of several calls, after two that are not counted."""
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


def _launches(device: torch.device) -> str:
    rows = []
    for layers in (8, 16, 32):
        plain, rebased = _kernels(layers, "none", device), _kernels(layers, "exact", device)
        rows.append([str(layers), str(plain), str(rebased), str(rebased - plain)])
    header = ["layers of one shape", "kernels, rule='none'", "kernels, rule='exact'", "added"]
    return markdown(header, rows)


def kernels_added(layers: int, device: torch.device) -> int:
    """Kernel launches that re-basing adds to the step of so many layers of one shape."""
    return _kernels(layers, "exact", device) - _kernels(layers, "none", device)


def _kernels(layers: int, rule: Rule, device: torch.device) -> int:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
    names = [str(i) for i in range(layers)]
    adapter = LoraConfig(r=_RANK, target_modules=names)
    model = get_peft_model(base.to(device, torch.bfloat16), adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trainable, lr=1e-3, fused=True)
    return _kernels_of_a_step(scalora.ScaLoRA(inner, model, rule=rule), trainable)


def _kernels_of_a_step(optimizer: scalora.ScaLoRA, parameters: list[nn.Parameter]) -> int:
    def set_gradients() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)

    for _ in range(3):
        set_gradients()
        optimizer.step()
    set_gradients()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.key
    )
