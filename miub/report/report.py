"""The report: what was measured, layer by layer, over time, and in total."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from miub.report.files import as_csv, as_json, read_json, write_whole
from miub.report.module_kinds import Place, places
from miub.report.record import LayerRecord
from miub.report.table import as_table

Key = str | tuple[str, str]

# What PEFT, DistributedDataParallel and torch.compile put before a module's name.
_WRAPPERS = frozenset({"base_model", "model", "module", "_orig_mod"})


@dataclass(frozen=True)
class LayerRow:
    """What was measured of one layer, all of it in nats.

    Attributes:
        layer, adapter, rank, rebased: as in `LayerRecord`.
        kind: of module, "q_proj"; see `module_kinds.places`.
        step: the step that it is of; of an average, the newest.
        value: the estimate.
        stderr: its standard error.
        lower: the InfoNCE lower bound; nan if it was not measured.
        tokens: how many tokens all of it was made from.
        steps: how many steps it is the average of.
        not_a_number: how many measurements came out as nan and are left out of it.
    """

    layer: str
    adapter: str
    kind: str
    step: int
    rank: int
    value: float
    stderr: float
    lower: float
    tokens: int
    rebased: bool
    steps: int = 1
    not_a_number: int = 0

    @property
    def per_rank(self) -> float:
        """``value / rank``: nats for each dimension of the adapter."""
        return self.value / self.rank


class KindTotal(NamedTuple):
    """Sums over layers, in nats; layers whose value is nan are left out."""

    mean: float
    total: float
    mean_per_rank: float
    layers: int


class MIUBReport:
    """What a monitor measured; ``print`` it for a table.

    A layer's row is its measurement at the newest step; `averaged` is the mean over all steps.
    Measurements of one layer at one step (of several processes or batches) are of different
    tokens: they are averaged, weighted by their tokens, and their standard errors combined as
    those of independent draws.

    ``report["model.layers.0.self_attn.q_proj"]`` is a layer's row, ``report[layer, adapter]``
    where several adapters were measured; the names that ``model.named_modules()`` gives are found
    as well, with what PEFT and other wrappers put before them.  Iteration is over the rows.

    Args:
        records: the measurements, in the order in which rows are to stand.
        estimator: what made them.
        noise: tau of theory.md, section 5.

    Attributes:
        estimator, noise: as above.
        history: per layer its rows, oldest step first; the keys are layers, or (layer, adapter)
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
    def _from_rows(cls, rows: Iterable[LayerRow], estimator: str, noise: float) -> MIUBReport:
        report = cls.__new__(cls)
        report._fill(rows, estimator, noise)
        return report

    def averaged(self) -> MIUBReport:
        """The mean of every layer over all steps, weighted by tokens.

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
        """Where every layer stands in the model."""
        return places(self.layers)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self._rows.values())

    def __contains__(self, key: object) -> bool:
        if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str):
            return (self._measured(key[0]), key[1]) in self._rows
        return isinstance(key, str) and self._measured(key) in self.layers

    def _measured(self, name: str) -> str:
        """The name of a measured layer, whatever wrappers are before it; else the name itself."""
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

    def _near(self, layer: str) -> str:
        within = [name for name in self.layers if name.endswith(f".{layer}")]
        near = (within or difflib.get_close_matches(layer, self.layers))[:3]
        if near:
            return f"Did you mean one of {near}?"
        return f"Measured were {len(self.layers)} layers, see report.layers."

    def by_kind(self, adapter: str | None = None) -> dict[str, KindTotal]:
        """Totals of every kind of module, of one adapter or of all."""
        rows = [row for row in self if adapter in (None, row.adapter)]
        kinds = dict.fromkeys(row.kind for row in rows)
        return {kind: _total(row for row in rows if row.kind == kind) for kind in kinds}

    def overall(self, adapter: str | None = None) -> KindTotal:
        """Totals of all layers, of one adapter or of all."""
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
    def mean_per_rank(self) -> float:
        """Mean over the layers of value / rank, in nats."""
        return self.overall().mean_per_rank

    def __str__(self) -> str:
        return as_table(self)

    def __repr__(self) -> str:
        return (
            f"<MIUBReport: {len(self.layers)} layers, estimator={self.estimator!r}, "
            f"noise={self.noise:g}, mean {self.mean:.4g} nats>"
        )

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line per layer and step, whole or not at all."""
        write_whole(path, as_csv(self))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write rows, history and totals, whole or not at all."""
        write_whole(path, as_json(self))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> MIUBReport:
        """The report that `to_json` wrote; infinite values come back as nan.

        Raises:
            ValueError: the file is not such a report.
        """
        rows, estimator, noise = read_json(path)
        try:
            return cls._from_rows([LayerRow(**row) for row in rows], estimator, noise)
        except TypeError as error:
            raise ValueError(f"{path} is not a report that MIUBReport.to_json wrote.") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a heat map of blocks against kinds, and lines over steps where there are several.

        Args:
            path: its suffix says the format (png, pdf, svg); png without one.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from miub.report.plot import draw

        write_whole(path, draw(self, path))


def _as_row(record: LayerRecord, kind: str) -> LayerRow:
    return LayerRow(
        layer=record.layer,
        adapter=record.adapter,
        kind=kind,
        step=record.step,
        rank=record.rank,
        value=record.value,
        stderr=record.stderr,
        lower=record.lower,
        tokens=record.tokens,
        rebased=record.rebased,
        not_a_number=int(math.isnan(record.value)),
    )


def _average(rows: Sequence[LayerRow]) -> LayerRow:
    """The mean of measurements of one layer, weighted by tokens, that are of different tokens."""
    newest = max(rows, key=lambda row: row.step)
    measured = [row for row in rows if not math.isnan(row.value)]
    bounded = [row for row in measured if not math.isnan(row.lower)]
    return LayerRow(
        layer=newest.layer,
        adapter=newest.adapter,
        kind=newest.kind,
        step=newest.step,
        rank=newest.rank,
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
    per_rank = math.fsum(row.per_rank for row in measured)
    return KindTotal(total / len(measured), total, per_rank / len(measured), len(measured))
