"""A report as a table for the terminal."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterable

from rich.box import Box
from rich.console import Console
from rich.table import Table

from miub.report.rows import LayerRows

# Rules in ASCII: a report is often sent to a file, in whatever encoding the machine has.
_RULES = Box("    \n    \n -- \n    \n -- \n    \n    \n    \n", ascii=True)
_NARROWEST = 72  # columns
_ALL = "all layers"
_MEASURED = ("MIUB (nats)", "per coordinate", "stderr", "lower bound", "tokens")

FOLDED_BASE = (
    "The frozen path of these layers has taken in increments that were folded into it: part of "
    "what was learned counts as frozen. With the pretrained weights (reference=) the monitor "
    "tells the two paths apart again."
)
_UNEVEN = (
    "Layers differ in coordinates, and a value depends on their number: compare these means and "
    "totals only with those of a run whose layers have the same."
)


def as_table(report: LayerRows) -> str:
    """Return title, a line per layer, totals per kind of module, and what the marks mean.

    The table is as wide as it needs to be.  Where the terminal is narrower, headings take two
    lines, and then names do.
    """
    layers, kinds = _layers(report, " "), _kinds(report)
    natural = max(Console(width=10_000).measure(table).maximum for table in (layers, kinds))
    width = max(_NARROWEST, min(natural, shutil.get_terminal_size((natural, 24)).columns))
    if width < natural:
        layers = _layers(report, "\n")
    text = io.StringIO()
    # Names of layers and adapters are no markup.
    console = Console(file=text, width=width, markup=False, highlight=False, emoji=False)
    for part in (_title(report), layers, kinds, *_footnotes(report)):
        console.print(part)
        console.print()
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _title(report: LayerRows) -> str:
    rows = list(report)
    averaged = max(row.steps for row in rows)
    when = f"mean over {averaged} steps to" if averaged > 1 else "step"
    return (
        f"MIUB: {report.estimator} estimator, noise tau = {report.noise:g}, "
        f"{_span(report.coordinates)} coordinates and {_span(row.tokens for row in rows)} tokens "
        f"per layer, {when} {_span(row.step for row in rows)}"
    )


def _layers(report: LayerRows, space: str) -> Table:
    """Return the lines of layers; ``space`` stands between the words of a heading."""
    table, adapters = _table("layer", report)
    uneven = _is_uneven(report)
    for name in (*(["coordinates"] if uneven else []), *_MEASURED):
        table.add_column(name.replace(" ", space), justify="right", no_wrap=True)
    for row in report:
        table.add_row(
            row.layer + (" *" if row.rebased else ""),
            *([row.adapter] if adapters else []),
            *([f"{row.coordinates}"] if uneven else []),
            *map(_nats, (row.value, row.per_coordinate, row.stderr, row.lower)),
            f"{row.tokens}",
        )
    return table


def _kinds(report: LayerRows) -> Table:
    table, adapters = _table("kind of module", report)
    for name in ("layers", "mean (nats)", "per coordinate", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for adapter in report.adapters:
        for kind, total in (*report.by_kind(adapter).items(), (_ALL, report.overall(adapter))):
            if kind == _ALL:
                table.add_section()
            table.add_row(
                kind,
                *([adapter] if adapters else []),
                f"{total.layers}",
                *map(_nats, (total.mean, total.mean_per_coordinate, total.total)),
            )
        table.add_section()
    return table


def _table(first: str, report: LayerRows) -> tuple[Table, bool]:
    """Return a table with its first column, and whether it has one for adapters."""
    table = Table(box=_RULES, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    adapters = len(report.adapters) > 1
    if adapters:
        table.add_column("adapter", overflow="fold")
    return table, adapters


def _footnotes(report: LayerRows) -> list[str]:
    notes = [f"* {FOLDED_BASE}"] if any(row.rebased for row in report) else []
    if _is_uneven(report):
        notes.append(_UNEVEN)
    lost = sum(row.not_a_number for row in report)
    if lost:
        notes.append(
            f"{lost} measurement{'s' if lost > 1 else ''} came out as nan (activations that are "
            "not finite) and count in no mean or total."
        )
    return notes


def _is_uneven(report: LayerRows) -> bool:
    least, most = report.coordinates
    return least < most


def _nats(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3e}"


def _span(numbers: Iterable[int]) -> str:
    numbers = list(numbers)
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"
