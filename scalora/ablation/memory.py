"""Bytes of tensors in a training step and between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def peak_of(
    step: Callable[[], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """Call ``step`` once and return the most bytes that tensors took at one time.

    On CUDA it is the allocator's own count. On the CPU it is the bytes of the model and the
    optimizer before the step, and the profiler's count of what the step allocates on top.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    held = bytes_held(model, optimizer)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    live = growth = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            growth = max(growth, live)
    return held + growth


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, pretrained: int) -> int:
    """Return the bytes that training adds to a pretrained model.

    They are the adapter and its carry, the gradients, and the optimizer's state. Full fine-tuning
    trains the model's own weights, so it adds the last two alone.

    Args:
        model, optimizer: as they train.
        pretrained: bytes of the model before anything was added, `bytes_of_model`.
    """
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return bytes_held(model, optimizer) + gradients - pretrained


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of weights, buffers and the optimizer's state; shared memory counts once."""
    kept: list[Tensor] = getattr(optimizer, "kept_tensors", list)()
    return _bytes([*model.parameters(), *model.buffers(), *_tensors_in(optimizer.state), *kept])


def bytes_of_model(model: nn.Module) -> int:
    """Return the bytes of weights and buffers; shared memory counts once."""
    return _bytes([*model.parameters(), *model.buffers()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors
    }
    return sum(storages.values())


def _tensors_in(state: Any) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors_in(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors_in(value)
