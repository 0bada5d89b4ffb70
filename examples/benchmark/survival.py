"""How much of real increments survives in a quantized base, and in a carry beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from examples.benchmark.formats import Format, formats
from examples.benchmark.increments import Increments, record
from examples.benchmark.stores import (
    Carry,
    Outcome,
    RequantizedBase,
    Rounding,
    Store,
    marks,
    outcome,
    typical,
)
from examples.benchmark.survival_plot import draw
from examples.benchmark.table import markdown

_RUNS = {1: 100, 10: 20}  # interval: re-basings
_SIZES = (1.0, 0.1, 0.01)
_NOTE = """\
D: an increment, or the sum of all. C: what it changed in what is stored.
Columns up to error: of one D, medians. From there on: of the sum, all layers as one vector.
stored: error of storing the pretrained weight W, over its norm.
half cells: |D| of an element in units of half its cell, median. codes: share that changed.
survived: <C, D> / <D, D>. error: |C - D| / |D|. of W: |C - D| / |W|. norm: |W + C| / |W|.
double: the scales are quantized too. held: the scales stay those of the pretrained weight."""

_Ways = dict[tuple[str, str], Callable[[Tensor], Store]]


@torch.no_grad()
def run(device: torch.device, plot: Path | None = None) -> str:
    """Re-basings of a pretrained encoder's fine-tuning, at interval 1 and 10, replayed.

    What the training run froze in float32 is put into each kind of store in the same order.

    Args:
        device: where everything is computed.
        plot: file to draw the curves of interval 1 to.
    """
    try:
        known = formats(device)
        runs = {interval: _recorded(interval, count, device) for interval, count in _RUNS.items()}
    except (ImportError, FileNotFoundError) as missing:
        return f"Left out: {missing}. It runs from a checkout with the extras demo and quantized."
    ways = _ways(known, device)
    parts = []
    for interval, layers in runs.items():
        outcomes = {name: outcome(way, layers) for name, way in ways.items()}
        parts += [_heading(interval, layers), _table(known, layers, outcomes)]
        if plot is not None and interval == 1:
            draw({name: result.curve for name, result in outcomes.items()}, plot)
    parts += [_NOTE, _by_size(ways, runs[1]), f"bitsandbytes {version('bitsandbytes')}"]
    return "\n\n".join(parts)


def _recorded(interval: int, count: int, device: torch.device) -> list[Increments]:
    with torch.enable_grad():
        return list(record(interval, count, device).values())


def _ways(known: dict[str, Format], device: torch.device) -> _Ways:
    """Return (format, rounding) -> function that makes a store from a weight."""
    generator = torch.Generator(device).manual_seed(0)
    ways: _Ways = {}
    for name, format_ in known.items():
        ways[name, "nearest"] = partial(_requantized, format_, format_.nearest)
        stochastic = partial(format_.stochastic, generator=generator)
        ways[name, "stochastic"] = partial(_requantized, format_, stochastic)
    ways["any", "carry"] = Carry
    return ways


def _requantized(format_: Format, rounding: Rounding, weight: Tensor) -> Store:
    return RequantizedBase(format_.nearest(weight), rounding)


def _heading(interval: int, layers: Sequence[Increments]) -> str:
    single, first, total = [], [], []
    for layer in layers:
        norm = float(layer.weight.double().norm())
        single += [float(layer.product(t).norm()) / norm for t in marks(layer)]
        first.append(float(layer.product(1).norm()) / norm)
        everything = torch.zeros_like(layer.weight, dtype=torch.float64)
        for t in range(1, len(layer.up) + 1):
            everything += layer.product(t)
        total.append(float(everything.norm()) / norm)
    count, weights = len(layers[0].up), sum(layer.weight.numel() for layer in layers)
    typical_, first_, total_ = _shares(*map(statistics.median, (single, first, total)))
    return (
        f"interval={interval}: {count} re-basings, {len(layers)} layers, {weights:,} weights. Over "
        f"the weight's norm,\none increment is {typical_}, the first {first_}, the sum of all "
        f"{total_} (medians)."
    )


def _table(
    known: dict[str, Format],
    layers: Sequence[Increments],
    outcomes: dict[tuple[str, str], Outcome],
) -> str:
    rows = []
    norm = sum(float(layer.weight.double().square().sum()) for layer in layers) ** 0.5
    of_format = {name: _of_format(format_, layers) for name, format_ in known.items()}
    for (name, rounding), result in outcomes.items():
        total = list(result.curve.values())[-1]
        all_ = _shares(total.survived, total.relative_error, total.error**0.5 / norm)
        rows.append([name, rounding, *of_format.get(name, ["", ""]), *_shares(*result.one), *all_])
        rows[-1].append(f"{result.norm:.3f}")
    header = ["base", "rounding", "stored", "half cells", "codes", "survived", "error"]
    return markdown([*header, "all: survived", "error", "of W", "norm"], rows)


def _of_format(format_: Format, layers: Sequence[Increments]) -> list[str]:
    """Error of storing the weights over their norm, and the median increment in half cells."""
    error, norm, ratios = 0.0, 0.0, []
    for layer in layers:
        stored = format_.nearest(layer.weight)
        error += float((stored.values - layer.weight).double().square().sum())
        norm += float(layer.weight.double().square().sum())
        for t in marks(layer):
            product = layer.product(t).float()
            ratios.append((product.abs() / format_.half_cells(stored, product)).flatten())
    return [_percent((error / norm) ** 0.5), f"{float(torch.cat(ratios).median()):.2f}"]


def _by_size(ways: _Ways, layers: Sequence[Increments]) -> str:
    """The increments of a gentler run: what survives of one, and how far off it is."""
    rows = []
    for name, way in ways.items():
        row = list(name)
        for size in _SIZES:
            row += _shares(*typical(way, layers, size)[1:])
        rows.append(row)
    header = ["base", "rounding"]
    for size in _SIZES:
        header += [f"D x {size:g}: survived", "error"]
    return "One increment of interval=1, and smaller ones in its place.\n\n" + markdown(
        header, rows
    )


def _shares(*values: float) -> list[str]:
    return [_percent(value) for value in values]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if abs(share) >= 1e-3 else f"{100 * share:.2g} %"
