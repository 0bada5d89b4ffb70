"""Measurements of layers: one row per layer, their history, and totals."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from miub.report.module_kinds import Place, places

if TYPE_CHECKING:
    from typing_extensions import Self

Key = str | tuple[str, str]

# Names that PEFT, DistributedDataParallel and torch.compile put before a module's own.
_WRAPPERS = frozenset({"base_model", "model", "module", "_orig_mod"})


@dataclass(frozen=True)
class LayerRecord:
    """One measurement of one layer, as plain numbers on the host.

    Attributes:
        layer: the module's name without PEFT's wrapping, "model.layers.0.self_attn.q_proj".
        adapter: the adapter's name.
        step: the monitor's step (forward passes of the model, counted from 1), or the
            Trainer's global step.
        coordinates: the dimension of the learned path: the adapter's r, and the columns of its
            carry; or up to 64 where the path is all that was learned since a reference.
        value: the estimate, in nats.
        stderr: its standard error, in nats.
        lower: the InfoNCE lower bound, in nats; nan if it was not measured.
        tokens: the number of tokens behind the estimate.
        rebased: whether the frozen path has taken in folded increments and no reference was given.
            The value is then not that of the pretrained weights against all that was learned.
    """

    layer: str
    adapter: str
    step: int
    coordinates: int
    value: float
    stderr: float
    lower: float
    tokens: int
    rebased: bool


@dataclass(frozen=True)
class LayerRow:
    """The measurement of one layer, or the average of several, in nats.

    Attributes:
        layer, adapter, coordinates, rebased: as in `LayerRecord`.
        kind: kind of module, "q_proj"; see `module_kinds.places`.
        step: the step of the measurement; of an average, the newest.
        value: the estimate.
        stderr: its standard error.
        lower: the InfoNCE lower bound; nan if it was not measured.
        tokens: the number of tokens behind all of it.
        steps: the number of steps that it averages.
        not_a_number: the number of measurements that came out as nan and are left out.
    """

    layer: str
    adapter: str
    kind: str
    step: int
    coordinates: int
    value: float
    stderr: float
    lower: float
    tokens: int
    rebased: bool
    steps: int = 1
    not_a_number: int = 0

    @property
    def per_coordinate(self) -> float:
        """``value / coordinates``, nats."""
        return self.value / self.coordinates

    @property
    def per_rank(self) -> float:
        """`per_coordinate`: a plain LoRA adapter has r coordinates."""
        return self.per_coordinate


class KindTotal(NamedTuple):
    """Mean and sum over layers, in nats; layers whose value is nan are left out."""

    mean: float
    total: float
    mean_per_coordinate: float
    layers: int


class LayerRows:
    """Rows of the measured layers, their history, and totals over them.

    Args:
        records: the measurements, in the order in which rows are to stand.
        estimator: the name of the estimator.
        noise: tau of the noise model.

    Attributes:
        estimator, noise: as above.
        history: the rows of each layer, oldest step first; the keys are layers, or (layer, adapter)
            where several adapters were measured.

    Raises:
        ValueError: there are no records.
    """

    def __init__(self, records: Sequence[LayerRecord], *, estimator: str, noise: float) -> None:
        if not records:
            raise ValueError(
                "no layer was measured: run at least one forward pass of the model inside the "
                "monitor, at a step that it measures (every=)."
            )
        where = places(record.layer for record in records)
        grouped: dict[tuple[str, str, int], list[LayerRow]] = {}
        for record in records:
            key = (record.layer, record.adapter, record.step)
            grouped.setdefault(key, []).append(_as_row(record, where[record.layer].kind))
        self._fill((_average(rows) for rows in grouped.values()), estimator, noise)

    def _fill(self, rows: Iterable[LayerRow], estimator: str, noise: float) -> None:
        by_key: dict[tuple[str, str], list[LayerRow]] = {}
        for row in rows:
            by_key.setdefault((row.layer, row.adapter), []).append(row)
        for history in by_key.values():
            history.sort(key=lambda row: row.step)
        self.estimator = estimator
        self.noise = noise
        self._rows = {key: history[-1] for key, history in by_key.items()}
        several = len(self.adapters) > 1
        self.history: dict[Key, list[LayerRow]] = {
            key if several else key[0]: history for key, history in by_key.items()
        }

    @classmethod
    def _from_rows(cls, rows: Iterable[LayerRow], estimator: str, noise: float) -> Self:
        made = cls.__new__(cls)
        made._fill(rows, estimator, noise)
        return made

    def averaged(self) -> Self:
        """Return the mean of each layer over all steps, weighted by tokens.

        For a model that stands still: an evaluation in which every batch is a step.
        """
        rows = (_average(history) for history in self.history.values())
        return self._from_rows(rows, self.estimator, self.noise)

    @property
    def layers(self) -> list[str]:
        """Names of the measured layers, each once."""
        return list(dict.fromkeys(layer for layer, _ in self._rows))

    @property
    def adapters(self) -> list[str]:
        """Names of the measured adapters."""
        return list(dict.fromkeys(adapter for _, adapter in self._rows))

    @property
    def places(self) -> dict[str, Place]:
        """The place of each layer in the model."""
        return places(self.layers)

    @property
    def coordinates(self) -> tuple[int, int]:
        """The fewest and the most coordinates of a layer."""
        found = [row.coordinates for row in self]
        return min(found), max(found)

    def by_kind(self, adapter: str | None = None) -> dict[str, KindTotal]:
        """Return the totals of each kind of module, of one adapter or of all."""
        rows = [row for row in self if adapter in (None, row.adapter)]
        kinds = dict.fromkeys(row.kind for row in rows)
        return {kind: _total(row for row in rows if row.kind == kind) for kind in kinds}

    def by_coordinates(self) -> dict[int, KindTotal]:
        """Return the totals of the layers with each number of coordinates, the fewest first."""
        numbers = sorted({row.coordinates for row in self})
        return {n: _total(row for row in self if row.coordinates == n) for n in numbers}

    def overall(self, adapter: str | None = None) -> KindTotal:
        """Return the totals of all layers, of one adapter or of all."""
        return _total(row for row in self if adapter in (None, row.adapter))

    @property
    def mean(self) -> float:
        """Mean over the layers, in nats."""
        return self.overall().mean

    @property
    def total(self) -> float:
        """Sum over the layers, in nats."""
        return self.overall().total

    @property
    def mean_per_coordinate(self) -> float:
        """Mean over the layers of ``value / coordinates``, in nats."""
        return self.overall().mean_per_coordinate

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows.values())

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str):
            return (self._measured(key[0]), key[1]) in self._rows
        return isinstance(key, str) and self._measured(key) in self.layers

    def __getitem__(self, key: Key) -> LayerRow:
        if isinstance(key, tuple):
            layer = self._measured(key[0])
            if (layer, key[1]) in self._rows:
                return self._rows[layer, key[1]]
            adapters = [adapter for name, adapter in self._rows if name == layer]
            if adapters:
                raise KeyError(f"{layer!r} was measured with {adapters}, not with {key[1]!r}.")
        else:
            layer = self._measured(key)
            rows = [row for row in self if row.layer == layer]
            if len(rows) == 1:
                return rows[0]
            if rows:
                raise KeyError(
                    f"{layer!r} was measured with several adapters: ask for report[layer, adapter] "
                    f"with one of {[row.adapter for row in rows]}."
                )
        raise KeyError(f"{layer!r} was not measured. {self._near(layer)}")

    def _measured(self, name: str) -> str:
        """Return the name of a measured layer without wrappers before it, else the name itself."""
        if name in self.layers:
            return name
        parts = name.split(".")
        # As few as possible: a model may itself be called "model" within its wrapper.
        for i in range(1, len(parts)):
            if parts[i - 1] not in _WRAPPERS:
                break
            inner = ".".join(parts[i:])
            if inner in self.layers:
                return inner
        return name

    def _near(self, layer: str) -> str:
        within = [name for name in self.layers if name.endswith(f".{layer}")]
        near = (within or difflib.get_close_matches(layer, self.layers))[:3]
        if near:
            return f"Did you mean one of {near}?"
        return f"Measured were {len(self.layers)} layers, see report.layers."


def _as_row(record: LayerRecord, kind: str) -> LayerRow:
    return LayerRow(
        layer=record.layer,
        adapter=record.adapter,
        kind=kind,
        step=record.step,
        coordinates=record.coordinates,
        value=record.value,
        stderr=record.stderr,
        lower=record.lower,
        tokens=record.tokens,
        rebased=record.rebased,
        not_a_number=int(math.isnan(record.value)),
    )


def _average(rows: Sequence[LayerRow]) -> LayerRow:
    """Return the mean of measurements of one layer on different tokens, weighted by tokens."""
    newest = max(rows, key=lambda row: row.step)
    measured = [row for row in rows if not math.isnan(row.value)]
    bounded = [row for row in measured if not math.isnan(row.lower)]
    return LayerRow(
        layer=newest.layer,
        adapter=newest.adapter,
        kind=newest.kind,
        step=newest.step,
        coordinates=newest.coordinates,
        value=_weighted_mean([(row.value, row.tokens) for row in measured]),
        # The variance of a weighted mean of independent numbers has the weights squared.
        stderr=_root_of_sum_of_squares([(row.stderr, row.tokens) for row in measured]),
        lower=_weighted_mean([(row.lower, row.tokens) for row in bounded]),
        tokens=sum(row.tokens for row in measured),
        rebased=any(row.rebased for row in rows),
        steps=sum({row.step: row.steps for row in rows}.values()),
        not_a_number=sum(row.not_a_number for row in rows),
    )


def _weighted_mean(weighted: Sequence[tuple[float, int]]) -> float:
    weight = sum(w for _, w in weighted)
    return sum(x * (w / weight) for x, w in weighted if w) if weight else math.nan


def _root_of_sum_of_squares(weighted: Sequence[tuple[float, int]]) -> float:
    weight = sum(w for _, w in weighted)
    return math.hypot(*(x * (w / weight) for x, w in weighted if w)) if weight else math.nan


def _total(rows: Iterable[LayerRow]) -> KindTotal:
    measured = [row for row in rows if not math.isnan(row.value)]
    if not measured:
        return KindTotal(math.nan, math.nan, math.nan, 0)
    total = math.fsum(row.value for row in measured)
    per_coordinate = math.fsum(row.per_coordinate for row in measured)
    return KindTotal(total / len(measured), total, per_coordinate / len(measured), len(measured))
