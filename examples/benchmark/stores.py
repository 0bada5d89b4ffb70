"""Places for increments, and how much of what was put into them is there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from examples.benchmark.formats import Rounded
from examples.benchmark.increments import Increments
from scalora.carry import compress

_POINTS = 10  # of a curve; every other one's increment is looked at on its own
_CARRY_RANK, _KEPT_RANK = 64, 48  # room for two increments of r = 8 between recompressions

Rounding = Callable[[Tensor, Rounded | None], Rounded]


class Sums(NamedTuple):
    """Comparison of C, what was stored, with D, what was to be stored; sums over layers.

    Attributes:
        kept: <C, D>.
        energy: <D, D>.
        error: <C - D, C - D>.
    """

    kept: float
    energy: float
    error: float

    @property
    def survived(self) -> float:
        """Return the share of D that is there, along its own direction."""
        return self.kept / self.energy

    @property
    def relative_error(self) -> float:
        """Return |C - D| / |D|: 1 is as far off as storing nothing."""
        return (self.error / self.energy) ** 0.5


class Typical(NamedTuple):
    """Medians of increments on their own, each into the store as it was at the start.

    Attributes:
        codes: share of the base's codes that one changes.
        survived, relative_error: of `Sums`.
    """

    codes: float
    survived: float
    relative_error: float


class Outcome(NamedTuple):
    """Survival of the increments in one kind of store, all layers together.

    Attributes:
        one: survival of one increment.
        curve: re-basings so far -> survival of the sum of their increments.
        norm: |W + C| / |W| at the end, W the pretrained weight.
    """

    one: Typical
    curve: dict[int, Sums]
    norm: float


class Store(Protocol):
    """A place for increments of a weight (m, n)."""

    def add(self, up: Tensor, down: Tensor) -> None:
        """Take in ``up @ down``, (m, r) times (r, n)."""

    def change(self) -> Tensor:
        """Return the sum of what was taken in, as it is stored: (m, n), float64."""

    def changed_codes(self) -> int:
        """Return how many of the base's codes have changed."""


class RequantizedBase:
    """The base weight itself, which is dequantized, increased and quantized again every time."""

    def __init__(self, start: Rounded, rounding: Rounding) -> None:
        self._start = self._now = start
        self._rounding = rounding

    def add(self, up: Tensor, down: Tensor) -> None:
        """See `Store`."""
        self._now = self._rounding(torch.addmm(self._now.values, up, down), self._now)

    def change(self) -> Tensor:
        """See `Store`."""
        return self._now.values.double() - self._start.values

    def changed_codes(self) -> int:
        """See `Store`."""
        return int((self._now.codes != self._start.codes).sum())


class Carry:
    """Low-rank factors in float32 beside the base, recompressed when they are full."""

    def __init__(self, weight: Tensor) -> None:
        self._up, self._down = weight[:, :0], weight[:0]

    def add(self, up: Tensor, down: Tensor) -> None:
        """See `Store`."""
        if self._up.shape[-1] + up.shape[-1] > _CARRY_RANK:
            self._up, self._down, *_ = compress(self._up, self._down, _KEPT_RANK)
        self._up = torch.cat([self._up, up], dim=-1)
        self._down = torch.cat([self._down, down])

    def change(self) -> Tensor:
        """See `Store`."""
        return self._up.double() @ self._down.double()

    def changed_codes(self) -> int:
        """See `Store`."""
        return 0


def outcome(store: Callable[[Tensor], Store], layers: Sequence[Increments]) -> Outcome:
    """Put the increments of every layer into stores that ``store`` makes from its weight."""
    curves, after, before = [], 0.0, 0.0
    for layer in layers:
        everything = store(layer.weight)
        curves.append(_replayed(everything, layer))
        after += float((layer.weight + everything.change()).square().sum())
        before += float(layer.weight.double().square().sum())
    curve = {t: _added([curve[t] for curve in curves]) for t in curves[0]}
    return Outcome(typical(store, layers), curve, (after / before) ** 0.5)


def typical(
    store: Callable[[Tensor], Store], layers: Sequence[Increments], size: float = 1
) -> Typical:
    """Return medians over a few re-basings and all layers of one increment times ``size``."""
    each = []
    for layer in layers:
        for t in marks(layer)[::-2]:
            one = store(layer.weight)
            one.add(size * layer.up[t - 1], layer.down[t - 1])
            sums = _sums(one.change(), size * layer.product(t))
            codes = one.changed_codes() / layer.weight.numel()
            each.append(Typical(codes, sums.survived, sums.relative_error))
    return Typical(*(statistics.median(values) for values in zip(*each, strict=True)))


def marks(layer: Increments) -> range:
    """Return evenly spaced re-basings, counted from 1, the last one among them."""
    count = len(layer.up)
    step = max(1, count // _POINTS)
    return range(count % step + step, count + 1, step)


def _replayed(store: Store, layer: Increments) -> dict[int, Sums]:
    total = torch.zeros_like(layer.weight, dtype=torch.float64)
    curve = {}
    for t, (up, down) in enumerate(zip(layer.up, layer.down, strict=True), start=1):
        total.addmm_(up.double(), down.double())
        store.add(up, down)
        if t in marks(layer):
            curve[t] = _sums(store.change(), total)
    return curve


def _sums(stored: Tensor, exact: Tensor) -> Sums:
    return Sums(
        float((stored * exact).sum()),
        float(exact.square().sum()),
        float((stored - exact).square().sum()),
    )


def _added(parts: Sequence[Sums]) -> Sums:
    return Sums(*(sum(values) for values in zip(*parts, strict=True)))
