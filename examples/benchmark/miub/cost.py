"""What the monitor costs: time of a training step with it, and memory while a layer is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.benchmark.demo_model import demo_batch, demo_model
from examples.benchmark.table import markdown
from miub.monitor import MIUBMonitor

_WARM_UP, _ROUNDS = 3, 24
_EVERY, _TOKENS = 50, 512
_WIDTH = 4096  # inputs and outputs of the layer whose memory is measured


def run(device: torch.device, rounds: int = _ROUNDS) -> str:
    """Return a table of steps of the demo's model with random weights, and a layer's memory.

    MiniLM-L6, batch 32 of 32 tokens, r = 8, AdamW.  The kinds of step take turns on one model, in
    one process.

    Args:
        device: of the model.
        rounds: in which each kind of step is taken once.
    """
    model, (ids, labels) = demo_model(device), demo_batch(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = _step(model, optimizer, ids, labels)
    monitor = MIUBMonitor(model, every=_EVERY, tokens=_TOKENS)
    monitor.attach()
    kinds: dict[str, Callable[[], None]] = {
        "no monitor": monitor.detach,
        "monitor, between measurements": lambda: _attached(monitor, 0),
        "monitor, measuring": lambda: _attached(monitor, _EVERY - 1),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(_WARM_UP + rounds):
        order = list(kinds)[turn % 3 :] + list(kinds)[: turn % 3]
        for kind in order:
            kinds[kind]()
            taken = _timed(step, device)
            if turn >= _WARM_UP:
                seconds[kind].append(taken)
    monitor.detach()
    plain, between, measuring = (seconds[kind] for kind in kinds)
    share = [(m + (_EVERY - 1) * b) / _EVERY for m, b in zip(measuring, between, strict=True)]
    rows = [
        [kind, f"{1e3 * statistics.median(times):.1f}", f"{_ratio(times, plain):.3f}"]
        for kind, times in (*seconds.items(), (f"monitor, every={_EVERY}, in the mean", share))
    ]
    layers = len(monitor.report().layers)
    clock = "CPU time of the process" if device.type == "cpu" else "wall-clock time"
    note = (
        f"{layers} layers, tokens={_TOKENS}, estimator={monitor.report().estimator!r}; {clock}; "
        f"ratio: over the step without a monitor in the same round, median of {rounds}."
    )
    return "\n\n".join([markdown(["step", "ms", "ratio"], rows), note, _memory()])


def _memory() -> str:
    peaks = ", ".join(
        f"{peak_of_a_layer(_WIDTH, dtype) / 1e6:.1f} MB ({str(dtype).removeprefix('torch.')})"
        for dtype in (torch.float32, torch.bfloat16)
    )
    return (
        f"Most memory while a layer of {_WIDTH} inputs and outputs is measured, {_TOKENS} tokens, "
        f"beside what the layer holds itself: {peaks}; torch's profiler, on the CPU."
    )


def peak_of_a_layer(width: int, dtype: torch.dtype, tokens: int = _TOKENS) -> int:
    """Return the most bytes allocated at once while a layer is measured, beyond those before.

    Args:
        width: inputs and outputs.
        dtype: of the layer and its inputs.
        tokens: sampled of twice as many.
    """
    base = nn.Sequential(nn.Linear(width, width)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0"]))
    layer = model.get_base_model()[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    measured = layer.get_base_layer()
    measured.register_forward_hook(lambda *_: profiler.start())
    with MIUBMonitor(model, every=1, tokens=tokens), torch.no_grad():
        # The monitor puts its hook on when the model is called: between the two of this function.
        model.register_forward_pre_hook(
            lambda *_: measured.register_forward_hook(lambda *_: profiler.stop()) and None
        )
        model(torch.randn(2 * tokens, width, dtype=dtype))
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    live = peak = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _attached(monitor: MIUBMonitor, steps_taken: int) -> None:
    monitor.detach()
    monitor.step = steps_taken
    monitor.attach()


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor
) -> Callable[[], None]:
    mask = torch.ones_like(ids)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    """Return the seconds of a step; on the CPU those of this process, whatever else runs."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    step()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(times: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, plain, strict=True))
