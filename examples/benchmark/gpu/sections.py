"""The parts of the GPU's table, each of a few rows."""

from __future__ import annotations

import importlib.util
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from examples.benchmark import step
from examples.benchmark.cases import Case, measured_steps
from examples.benchmark.fold import bandwidths, copy_rate
from examples.benchmark.launches import launches
from examples.benchmark.llama import BLOCKS, LAYERS_PER_BLOCK, VOCABULARY, llama, with_lora
from examples.benchmark.peers import MakeOptimizer, adamw, rebasing
from miub import MIUBMonitor

_TESTS = Path(__file__).parents[3] / "tests"
_WARM_UP, _STEPS = 5, 20  # two re-basings of the default among them
_ROUNDS = 10
_TIMED: dict[str, MakeOptimizer] = {
    "AdamW": adamw,
    "default, while it calibrates": rebasing(),
    "default": rebasing(calibration=_WARM_UP),
    "default, interval=1": rebasing(calibration=_WARM_UP, interval=1),
    "default, interval=5": rebasing(calibration=_WARM_UP, interval=5),
    "exact, interval=1": rebasing(rule="exact"),
    "exact, interval=5": rebasing(rule="exact", interval=5),
}
_LAUNCHED = {
    "AdamW": Case(),
    "rule='none'": Case(rule="none"),
    "default": Case(rule="auto"),
    "exact": Case(rule="exact"),
}


class Row(NamedTuple):
    """One line of the table."""

    measured: str
    value: str
    beside: str = ""


def folds(device: torch.device, small: bool) -> list[Row]:
    """Return the fold's bandwidth for every shape, beside a plain copy's."""
    dtype = torch.bfloat16
    peak = copy_rate(dtype, device)
    rows = bandwidths(device, dtype, peak, small=small)
    beside = f"a copy: {peak / 1e9:.0f} GB/s"
    return [
        Row(f"fold of {layers}", f"{ms} ms, {rate} GB/s", f"{share} of {beside}")
        for layers, ms, rate, share in rows
    ]


def launched(device: torch.device, small: bool) -> list[Row]:
    """Return what steps launch, as the profiler sees it, beside the operations of the trace."""
    blocks = 2 if small else BLOCKS
    rows = []
    for name, case in _LAUNCHED.items():
        model = with_lora(llama(blocks, device, small=small))
        found = measured_steps(launches, model, case)
        del model
        for kind, seen in found.items():
            value = f"{seen.kernels} kernels, {seen.copies} copies, {seen.waits} waits"
            rows.append(Row(f"{name}, {kind} step", value, _traced(case, kind)))
    return rows


def _traced(case: Case, kind: str) -> str:
    if not torch.backends.cuda.is_built():
        return "not traced: this torch has no CUDA in it"
    from examples.benchmark.device_trace import fake_llama, step_operations
    from examples.benchmark.fake_device import fake_device

    with fake_device() as device:  # the count is the same at every depth
        return f"{step_operations(device, fake_llama(1), case)[kind].total()} operations traced"


def steps(device: torch.device, small: bool) -> list[Row]:
    """Return the time of whole training steps on a Llama-8B, relative to AdamW's."""
    base = llama(2 if small else BLOCKS, device, small=small)
    ids = torch.randint(VOCABULARY, (4, 16 if small else 512), device=device)
    rows, first = [], 0.0
    for name, make in _TIMED.items():
        model = with_lora(base)
        optimizer = make(model, None)

        def train(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        _repeat(train, _WARM_UP)
        seconds = _seconds(partial(_repeat, train, _STEPS), device) / _STEPS
        first = first or seconds
        rows.append(
            Row(f"training step, {name}", f"{1e3 * seconds:.1f} ms", f"{seconds / first:.3f}")
        )
        base = model.unload()
    return rows


def monitor(device: torch.device, small: bool) -> list[Row]:
    """Return what a pass that MIUB measures in costs beside one that it does not."""
    blocks = 2 if small else 8
    model = with_lora(llama(blocks, device, small=small))
    ids = torch.randint(VOCABULARY, (4, 32 if small else 512), device=device)
    mask = torch.ones_like(ids)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)

    plain = statistics.median(_seconds(forward, device) for _ in range(_ROUNDS))
    without = launches(forward)
    with MIUBMonitor(model, every=1):
        measuring = statistics.median(_seconds(forward, device) for _ in range(_ROUNDS))
        seen = launches(forward)
    layers = blocks * LAYERS_PER_BLOCK
    each = (seen.kernels - without.kernels) / layers
    waits = seen.waits - without.waits
    return [
        Row("forward pass, no monitor", f"{1e3 * plain:.1f} ms", f"{layers} LoRA layers"),
        Row(
            "forward pass that MIUB measures in",
            f"{1e3 * measuring:.1f} ms",
            _ratio(measuring, plain),
        ),
        Row("MIUB, per layer", f"{each:.0f} kernels", f"{waits} waits in all layers"),
    ]


def four_bit(device: torch.device, small: bool) -> list[Row]:
    """Return the time of steps over an NF4 base with a carry, relative to QLoRA's."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return [Row("NF4", "not run", "bitsandbytes is not here: give its wheel with --wheels")]
    rows = step.quantized_rows(device, blocks=1 if small else step.BLOCKS)
    return [
        Row(f"NF4, {name}", f"{ms} ms", f"{ratio}; {state} more state; peak {peak} MiB")
        for name, ms, ratio, state, peak, _ in rows
    ]


def tests(device: torch.device, small: bool) -> list[Row]:
    """Run the tests that are marked ``gpu``, and return their number; without a GPU they skip."""
    marked = [str(path) for path in _TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text()]
    paths = [str(_TESTS / "test_gpu.py")] if small else sorted(marked)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=_TESTS.parent, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip("= ")
    return [Row("tests marked gpu", summary), *(Row("", line) for line in failed)]


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(seconds: float, plain: float) -> str:
    return f"{seconds / plain:.3f}"


SECTIONS: dict[str, Callable[[torch.device, bool], list[Row]]] = {
    "folds": folds,
    "launches": launched,
    "steps": steps,
    "monitor": monitor,
    "four-bit": four_bit,
    "tests": tests,
}
