"""A whole training step of ScaLoRA and of its peers, relative to AdamW alone."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import scalora
from examples.benchmark.demo_model import demo_batch, demo_model, quantized_demo_model
from examples.benchmark.peers import PEERS, MakeOptimizer, adamw, rebasing
from examples.benchmark.table import markdown

_WARM_UP, BLOCKS, _BLOCK = 4, 6, 10  # rounds; a block holds one re-basing of interval=10

_COLUMNS = 64
_IN_A_CARRY: dict[str, Any] = {"accumulator": "carry", "carry_rank": _COLUMNS}


@dataclass
class _Contestant:
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)


def run(device: torch.device, blocks: int = BLOCKS) -> str:
    """Return a table of whole steps: MiniLM-L6 (random weights), batch 32 of 32 tokens, r = 8.

    The contestants take their steps in turn, in one process, so that the ratio of each round is of
    steps made under the same conditions.
    """
    exact: dict[str, Any] = {"rule": "exact"}
    makers = {
        "AdamW alone": adamw,
        "rule='none'": rebasing(rule="none"),
        "the default": rebasing(),
        "exact": rebasing(**exact),
        "exact, interval=10": rebasing(**exact, interval=10),
        "direction": rebasing(rule="direction"),
        "exact, carry": rebasing(**exact, **_IN_A_CARRY),
        "exact, interval=10, carry": rebasing(**exact, **_IN_A_CARRY, interval=10),
        **PEERS,
    }
    return _table(_rows(_contestants(makers, demo_model, device), device, blocks), blocks)


def run_quantized(device: torch.device, blocks: int = BLOCKS) -> str:
    """Return the table of the same encoder in NF4, every increment in a carry of 64 columns."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "Not run: bitsandbytes is not installed."
    return _table(quantized_rows(device, blocks), blocks)


def quantized_rows(device: torch.device, blocks: int) -> list[list[str]]:
    """Return the rows of QLoRA and of the carry beside it.

    The second adapter is PEFT's own, of rank 64 and frozen: what a carry would cost if it were one.

    Args:
        device: where to train; bitsandbytes must be installed.
        blocks: of ten rounds.
    """
    exact: dict[str, Any] = {"rule": "exact", **_IN_A_CARRY}
    makers = {
        "QLoRA": adamw,
        "QLoRA, frozen second adapter": _with_frozen_adapter,
        "the default, calibrated": rebasing(rule="leak", **_IN_A_CARRY),
        "exact": rebasing(**exact),
        "exact, interval=10": rebasing(**exact, interval=10),
    }
    return _rows(_contestants(makers, quantized_demo_model, device), device, blocks)


def _contestants(
    makers: Mapping[str, MakeOptimizer],
    make_model: Callable[[torch.device], PeftModel],
    device: torch.device,
) -> list[_Contestant]:
    """Return a contestant, with a model of its own, for every optimizer that is installed."""
    found = []
    for name, make in makers.items():
        model = make_model(device)
        with suppress(ImportError):  # an older PEFT
            found.append(_Contestant(name, model, make(model, None)))
    return found


def _with_frozen_adapter(model: PeftModel, foreach: bool | None) -> torch.optim.Optimizer:
    encoder = model.peft_config["default"].target_modules
    model.add_adapter("carry", LoraConfig(r=64, lora_alpha=64, target_modules=encoder))
    model.base_model.set_adapter(["default", "carry"])
    for name, parameter in model.named_parameters():
        if ".carry." in name:
            parameter.requires_grad_(False)
    return adamw(model, foreach)


def _table(rows: list[list[str]], blocks: int) -> str:
    header = ["optimizer", "ms per step", "ratio", "extra state", "peak MiB", "ratio"]
    note = (
        f"ratio: of each round of {_BLOCK} steps its time over the first's in that round, median "
        f"of {blocks} rounds;\nnot the quotient of the ms, since the machine's speed drifts.\n"
        "extra state: bytes kept between steps over those of adapter and AdamW.\n"
        "peak: most bytes allocated at once during a step (one that re-bases)."
    )
    return markdown(header, rows) + "\n\n" + note


def _rows(contestants: list[_Contestant], device: torch.device, blocks: int) -> list[list[str]]:
    """Return name, ms per step, ratio, extra state, peak MiB, ratio; the first is the measure."""
    ids, labels = demo_batch(device)
    for contestant in contestants:
        _fill_carries(contestant, ids, labels)
    for turn in range(_WARM_UP + blocks * _BLOCK):
        order = contestants[turn % len(contestants) :] + contestants[: turn % len(contestants)]
        for contestant in order:
            seconds = _timed_step(contestant, ids, labels)
            if turn >= _WARM_UP:
                contestant.seconds.append(seconds)
    alone = contestants[0]
    own = _bytes_of(alone)
    peaks = [_peak_bytes(contestant, ids, labels) for contestant in contestants]
    return [
        [
            contestant.name,
            f"{1e3 * statistics.median(contestant.seconds):.1f}",
            f"{_ratio(contestant.seconds, alone.seconds):.3f}",
            f"{100 * (_bytes_of(contestant) - own) / own:.2f} %",
            f"{peak / 2**20:.1f}",
            f"{peak / peaks[0]:.3f}",
        ]
        for contestant, peak in zip(contestants, peaks, strict=True)
    ]


def _fill_carries(contestant: _Contestant, ids: Tensor, labels: Tensor) -> None:
    """Re-base until a carry is full: its compressions are part of what a step costs."""
    optimizer = contestant.optimizer
    if not isinstance(optimizer, scalora.ScaLoRA) or optimizer.options.accumulator == "auto":
        return
    while min(row.columns for row in optimizer.report()) < _COLUMNS:
        optimizer.zero_grad()
        contestant.model(input_ids=ids, labels=labels).loss.backward()
        optimizer._rebaser.rebase(optimizer.inner, 0)
        optimizer.inner.step()
        optimizer._rebaser.learned.count(optimizer.param_groups)


def _step(contestant: _Contestant, ids: Tensor, labels: Tensor) -> None:
    contestant.optimizer.zero_grad()
    contestant.model(input_ids=ids, labels=labels).loss.backward()
    contestant.optimizer.step()


def _timed_step(contestant: _Contestant, ids: Tensor, labels: Tensor) -> float:
    _wait(ids.device)
    start = time.perf_counter()
    _step(contestant, ids, labels)
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(seconds: list[float], alone: list[float]) -> float:
    """Return the median over blocks, whose sums count re-basing steps at their true share."""
    starts = range(0, len(seconds), _BLOCK)
    return statistics.median(
        sum(seconds[start : start + _BLOCK]) / sum(alone[start : start + _BLOCK])
        for start in starts
    )


def _bytes_of(contestant: _Contestant) -> int:
    """Return bytes kept between steps: trainable parameters, optimizer state, ScaLoRA's own."""
    tensors: list[Tensor] = [p for p in contestant.model.parameters() if p.requires_grad]
    for state in contestant.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    if isinstance(contestant.optimizer, scalora.ScaLoRA):
        tensors += contestant.optimizer.kept_tensors()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes(contestant: _Contestant, ids: Tensor, labels: Tensor) -> int:
    """Return the most bytes allocated at once during one step, beyond those before it."""
    steps_to_rebasing = -(_WARM_UP + len(contestant.seconds) + 1) % _BLOCK
    for _ in range(steps_to_rebasing):
        _step(contestant, ids, labels)
    contestant.optimizer.zero_grad()
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(contestant, ids, labels)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        _step(contestant, ids, labels)
    assert profiler.profiler is not None
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
