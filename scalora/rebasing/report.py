"""What re-basing did to every layer, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scalora.carry import Carry
from scalora.peft_layers import LoRAPair
from scalora.rebasing.batches import thin_factors


@dataclass(frozen=True)
class LayerReport:
    """One layer's.

    Attributes:
        layer: its name.
        accumulator: ``"dense"`` or ``"carry"``.
        rank: the adapter's r.
        columns: of the carry that are used; 0 with ``"dense"``.
        capacity: the columns that the carry has room for.
        cut: the energy (squared Frobenius norm) of all that was cut from the carry, relative to
            that of what the layer has learned, carry and adapter together.
        bytes: of the carry; of a sharded layer's, of what this process keeps.
    """

    layer: str
    accumulator: str
    rank: int
    columns: int
    capacity: int
    cut: float
    bytes: int


class RebasingReport:
    """All layers', in the model's order; prints as a table."""

    def __init__(self, rows: Sequence[LayerReport]) -> None:
        self.rows = list(rows)

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
        """Of the layer that lost most."""
        return max((row.cut for row in self.rows), default=0.0)

    def __str__(self) -> str:
        table = Table("layer", "accumulator", title="Re-based layers")
        for name in ("rank", "carry", "room", "energy cut", "KiB"):
            table.add_column(name, justify="right")
        for row in self.rows:
            carried = row.accumulator == "carry"
            table.add_row(
                row.layer,
                row.accumulator,
                str(row.rank),
                str(row.columns) if carried else "",
                str(row.capacity) if carried else "",
                f"{row.cut:.1e}" if carried else "",
                f"{row.bytes / 1024:.0f}" if carried else "",
            )
        console = Console(file=StringIO(), width=120)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


@torch.no_grad()
def rebasing_report(pairs: Sequence[LoRAPair], places: Mapping[str, str]) -> RebasingReport:
    """Of these layers.  Waits for the device once a layer."""
    rows = []
    for pair in pairs:
        carry = pair.carry
        rows.append(
            LayerReport(
                layer=pair.name,
                accumulator=places[pair.name],
                rank=pair.rank,
                columns=0 if carry is None else carry.columns,
                capacity=0 if carry is None else carry.capacity,
                cut=0.0 if carry is None else float(_relative_cut(pair, carry)),
                bytes=0 if carry is None else carry.up.nbytes + carry.down.nbytes,
            )
        )
    return RebasingReport(rows)


def _relative_cut(pair: LoRAPair, carry: Carry) -> Tensor:
    P, Q = thin_factors([pair])
    return carry.relative_cut(P[0], Q[0])
