"""Report of what re-basing has done to every layer: numbers for a log, a table, a figure.

Held by tests/rebasing/test_sketch.py and tests/rebasing/test_carry_training.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from math import hypot, inf, isfinite, nan
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scalora import sharding
from scalora.carry import Carry
from scalora.moments.history import widened
from scalora.peft_layers import LoRAPair
from scalora.plotting import LayerNumbers, layers_figure, write_figure
from scalora.rebasing.batches import thin_factors
from scalora.rebasing.rebaser import Rebaser
from scalora.rebasing.sketch import SKETCH_SIZE, FrozenSketches
from scalora.step_length.rates import host_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_RANK_SO_FAR = (
    "rank so far: effective rank of the whole change; a lower bound, from sketches of "
    f"{SKETCH_SIZE} x {SKETCH_SIZE}"
)


@dataclass(frozen=True)
class LayerReport:
    """Report of one layer; numbers that are not known are NaN.

    Attributes:
        layer: its name.
        accumulator: ``"dense"`` or ``"carry"``.
        rank: the adapter's r.
        columns: of the carry that are used; 0 with ``"dense"``.
        capacity: the columns that the carry has room for.
        cut: the energy (squared Frobenius norm) of all that was cut from the carry, relative to
            that of what the layer has learned, carry and adapter together.
        bytes: of the carry; of a sharded layer's, of what this process keeps.
        frozen_columns: columns frozen so far, r per re-basing; NaN after resuming from a state
            that does not say.
        effective_rank: of the whole change so far, or less: right where it is small, and never
            above 64 (`SketchedChange.effective_rank`); NaN for sharded layers, and for one that is
            not finite.
        frozen_norm: Frobenius norm of the sum of all that was frozen, from its sketch, within about
            a tenth; NaN likewise.
        trainable_norm: likewise, of the adapter's product as it is.
        age: mean over the columns of ``lora_B`` of their age in steps (docs/mathematics.md, the
            memory of an adapter): the number of steps at the highest learning rate, as long as
            calibrated and all in one direction, that a column is made of.  NaN where the inner
            optimizer's direction is not known.
    """

    layer: str
    accumulator: str
    rank: int
    columns: int
    capacity: int
    cut: float
    bytes: int
    frozen_columns: float
    effective_rank: float
    frozen_norm: float
    trainable_norm: float
    age: float


class RebasingReport:
    """All layers' reports, in the model's order; prints as a table.

    Attributes:
        rows: one for each layer.
        rebase_count: re-basings so far.
        next_rebasing: steps until the next one; None if there will be none.
    """

    def __init__(
        self, rows: Sequence[LayerReport], rebase_count: int = 0, next_rebasing: int | None = None
    ) -> None:
        self.rows = list(rows)
        self.rebase_count = rebase_count
        self.next_rebasing = next_rebasing

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, layer: str) -> LayerReport:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise KeyError(layer)

    @property
    def largest_cut(self) -> float:
        """Cut of the layer that lost most."""
        return max((row.cut for row in self.rows), default=0.0)

    def __str__(self) -> str:
        table = Table("layer", "accumulator", title=self._title, caption=_RANK_SO_FAR)
        names = ["r", "rank so far", "frozen norm", "trainable norm", "age"]
        carried = any(row.accumulator == "carry" for row in self.rows)
        for name in [*names, *(["carry", "room", "energy cut", "KiB"] if carried else [])]:
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = [
                row.layer,
                row.accumulator,
                str(row.rank),
                _shown(row.effective_rank, ".1f"),
                _shown(row.frozen_norm, ".3g"),
                _shown(row.trainable_norm, ".3g"),
                _shown(row.age, ".1f"),
            ]
            if row.accumulator == "carry":
                cells += [str(row.columns), str(row.capacity), f"{row.cut:.1e}"]
                cells += [f"{row.bytes / 1024:.0f}"]
            table.add_row(*cells)
        # The table takes of the width what it needs; a name in brackets is no markup.
        console = Console(file=StringIO(), width=240, markup=False)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    @property
    def _title(self) -> str:
        title = f"Re-based {_times(self.rebase_count)}"
        if self.next_rebasing is not None:
            title += f", next in {_steps(self.next_rebasing)}"
        return title

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Return a figure of every layer: its rank so far, and its sizes trainable and frozen.

        Left, the effective rank of the whole change stands against the adapter's r, where LoRA
        ends.  It is a lower bound, as in the rows.  Right are the Frobenius norms of what is
        trainable and of the sum of all that was frozen.

        Args:
            path: a file to write the figure to as well; its suffix names the format (.png, .svg,
                .pdf).

        Returns:
            A figure of matplotlib's, which ``savefig`` writes and a notebook shows.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing is known of any layer, as with rule='none' or of a sharded model;
                or a path of no known format.
        """
        layers = [
            LayerNumbers(
                row.layer, row.rank, row.effective_rank, row.frozen_norm, row.trainable_norm
            )
            for row in self
        ]
        figure = layers_figure(layers, self._title)
        if path is not None:
            write_figure(figure, path)
        return figure


@torch.no_grad()
def rebasing_report(
    rebaser: Rebaser,
    optimizer: torch.optim.Optimizer,
    step_factor: Tensor | None,
    rebase_count: int,
    next_rebasing: int | None,
) -> RebasingReport:
    """Report on every layer that still has its adapter.  Waits for the device, often.

    Args:
        rebaser: of the layers.
        optimizer: the inner one.
        step_factor: length of a step over the inner optimizer's, (); None for 1.
        rebase_count, next_rebasing: of the `RebasingReport`.
    """
    rows = []
    frozen = rebaser.frozen
    changes = frozen.changes()
    factor = 1.0 if step_factor is None else float(step_factor)
    for pair in rebaser.pairs:
        if not pair.exists:
            continue
        carry, change = pair.carry, changes.get(pair.name)
        rows.append(
            LayerReport(
                layer=pair.name,
                accumulator=rebaser.places[pair.name],
                rank=pair.rank,
                columns=0 if carry is None else carry.columns,
                capacity=0 if carry is None else carry.capacity,
                cut=0.0 if carry is None else float(_relative_cut(pair, carry)),
                bytes=0 if carry is None else carry.up.nbytes + carry.down.nbytes,
                frozen_columns=frozen.columns.get(pair.name, 0) if frozen.knows_columns else nan,
                effective_rank=nan if change is None else change.effective_rank,
                frozen_norm=nan if change is None else float(change.frozen.norm()),
                trainable_norm=nan if change is None else float(change.trainable.norm()),
                age=_age(pair, rebaser, optimizer) / factor,
            )
        )
    return RebasingReport(rows, rebase_count, next_rebasing)


@torch.no_grad()
def progress(
    frozen: FrozenSketches, step_factor: Tensor | None, rebase_count: int
) -> dict[str, float]:
    """Return a run's progress in numbers for a log (`scalora.ScaLoRA.progress`)."""
    found: dict[str, float] = {"rebased": rebase_count}
    if step_factor is not None:
        found["step_factor"] = float(step_factor)
    changes = frozen.changes().values()
    ranks = [change.effective_rank for change in changes]
    if ranks and all(map(isfinite, ranks)):
        found["rank"] = sum(ranks) / len(ranks)
        trainable = hypot(*(float(change.trainable.norm()) for change in changes))
        if trainable > 0:
            everything = hypot(*(float(change.frozen.norm()) for change in changes))
            found["frozen_norm"] = everything / trainable
    return found


def _age(pair: LoRAPair, rebaser: Rebaser, optimizer: torch.optim.Optimizer) -> float:
    """Return the mean age of a layer's columns, in steps of the inner optimizer."""
    P, moments = pair.P_parameter, rebaser.moments
    if moments.direction is None or sharding.is_sharded(P):
        return nan
    groups = optimizer.param_groups
    index = next((i for i, g in enumerate(groups) if any(p is P for p in g["params"])), None)
    if index is None:
        return nan
    group = groups[index]
    # Without gradients, as after `zero_grad`: the direction that the moments alone give.
    grad = widened(torch.zeros_like(P) if P.grad is None else P.grad)
    state = moments.stacked_states(optimizer, [P])
    direction = moments.direction(widened(P.detach())[None], grad[None], state, group)[0]
    peak = float(rebaser.learned.peak(index, host_rate(group["lr"])))
    columns = widened(P.detach()).flatten(1).norm(dim=0)
    step = peak * float(direction.flatten(1).norm()) / pair.rank**0.5
    age = float(columns.mean()) / step if step > 0 else inf
    return age if age < inf else nan


def _relative_cut(pair: LoRAPair, carry: Carry) -> Tensor:
    P, Q = thin_factors([pair])
    return carry.relative_cut(P[0], Q[0])


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _shown(value: float, how: str) -> str:
    return "" if value != value else format(value, how)
