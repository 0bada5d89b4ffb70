"""The most bytes that tensors take at once in a training step."""

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
    """Bytes of tensors at the worst moment of ``step``, which is called once.

    Those of the model and the optimizer are counted before it.  On CUDA both are the allocator's
    own counts, on the CPU the profiler's of what is allocated on top.
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


def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and the optimizer's state, what is shared counted once."""
    kept: list[Tensor] = getattr(optimizer, "kept_tensors", list)()
    tensors = [*model.parameters(), *model.buffers(), *_tensors_in(optimizer.state), *kept]
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
