"""Kernels, copies and waits of a call, as torch.profiler sees them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import scalora
from scalora.options import Rule

_CALL = "measured call"


@dataclass(frozen=True)
class Launches:
    """How much a call put on a GPU.

    Attributes:
        kernels: launched.
        copies: and fills of memory.
        waits: how often the host stopped until the device was done.
    """

    kernels: int
    copies: int
    waits: int


def launches(call: Callable[[], object]) -> Launches:
    """Return what a call launches; all zero without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(_CALL):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return launches_among(profiler.events() or ())


def launches_among(events: Iterable[Any]) -> Launches:
    """Count the calls of CUDA among the profiler's events that began within the measured call."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    span = next(event.time_range for event in on_host if event.name == _CALL)
    names = [e.name for e in on_host if span.start <= e.time_range.start <= span.end]
    called = [name for name in names if name.startswith("cu")]  # cuda... or the driver's cu...
    return Launches(
        kernels=sum("LaunchKernel" in name for name in called),
        copies=sum("Memcpy" in name or "Memset" in name for name in called),
        waits=sum("Synchronize" in name for name in called),
    )


def kernels_added(layers: int, device: torch.device) -> int:
    """Return the kernels that ``rule="exact"`` adds to the step of layers of one shape."""
    return _kernels(layers, "exact", device) - _kernels(layers, "none", device)


def _kernels(layers: int, rule: Rule, device: torch.device) -> int:
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
    adapter = LoraConfig(r=8, target_modules=[str(i) for i in range(layers)])
    model = get_peft_model(base.to(device, torch.bfloat16), adapter)
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    optimizer = scalora.ScaLoRA(inner, model, rule=rule)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(3):
        optimizer.step()
    return launches(optimizer.step).kernels
