"""A training step with the monitor relative to the same step without it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.benchmark.demo_model import demo_batch, demo_model
from examples.benchmark.table import markdown
from miub.monitor import MIUBMonitor

_WARM_UP, _ROUNDS = 3, 24
_EVERY, _TOKENS = 50, 512


def run(device: torch.device) -> str:
    """MiniLM-L6 (the demo's model, random weights), batch 32 of 32 tokens, r = 8, AdamW.

    The kinds of step take turns on one model, in one process.
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
    for turn in range(_WARM_UP + _ROUNDS):
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
    note = (
        f"{layers} layers, tokens={_TOKENS}, estimator={monitor.report().estimator!r}; ratio: over "
        f"the step without a monitor in the same round, median of {_ROUNDS}."
    )
    return markdown(["step", "ms", "ratio"], rows) + "\n\n" + note


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
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(times: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, plain, strict=True))
