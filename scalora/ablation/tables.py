"""The report's tables, for a terminal and as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from examples.benchmark.table import markdown
from scalora.ablation.plan import TaskPlan
from scalora.ablation.rows import BASELINE, Row
from scalora.ablation.summary import Statistic

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is to the left, the others to the right.

    brief: whether it belongs in a terminal as well.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    brief: bool = True


def tables_of(plan: TaskPlan, rows: Sequence[Row]) -> list[Table]:
    """Return what is learned, what changed, what it costs, and the losses by learning rate."""
    tables = [_learning(plan, rows), _change(plan, rows), _cost(rows), _rates(plan, rows)]
    return tables + ([_layers(rows)] if any(row.miub_of_layers for row in rows) else [])


def as_markdown(table: Table) -> str:
    """Return the table under its title, notes below."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    parts = [f"### {table.title}", markdown(table.header, cells), "\n".join(table.notes)]
    return "\n\n".join(part for part in parts if part)


def print_table(table: Table, console: Console) -> None:
    """Print the table, notes below."""
    printed = RichTable(title=table.title, title_justify="left")
    for i, name in enumerate(table.header):
        printed.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        printed.add_row(*row)
    console.print(printed)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)


def _learning(plan: TaskPlan, rows: Sequence[Row]) -> Table:
    scores = list(dict.fromkeys(name for row in rows for name in row.test))
    header = ("method", "rate", *(f"test {name}" for name in scores))
    compared = any(row.difference is not None for row in rows)
    if compared:
        header += (f"{plan.metric} − LoRA's", "steps to LoRA's", "worst rate")
    body = []
    for row in rows:
        cells = [row.method, _rate(row.best), *(shown(row.test.get(name)) for name in scores)]
        if compared:
            cells += [
                NONE if row.method == BASELINE else shown(row.difference, signed=True),
                _arrival(row),
                _ratio(row.robustness),
            ]
        body.append(tuple(cells))
    notes = [
        f"Mean ± standard error over {_seeds(len(plan.seeds))}; {plan.steps} steps, rank "
        f"{plan.rank}. rate: the best of {len(plan.learning_rates)} by validation "
        f"{plan.metric} over {_seeds(len(plan.search_seeds))}; the test split is not looked at."
    ]
    if compared:
        notes.append(
            f"{plan.metric} − LoRA's: mean and standard error of the differences at the same seed. "
            "steps to LoRA's: until the validation loss is LoRA's at the end. worst rate: the "
            "highest of the validation losses by learning rate, over the lowest of LoRA's."
        )
    notes += [_lacking(row) for row in rows if row.failed or row.missing]
    return Table(f"{plan.name}: learning", header, body, tuple(notes))


def _change(plan: TaskPlan, rows: Sequence[Row]) -> Table:
    header = (
        *("method", "forgetting", "effective rank", "stable rank"),
        *(f"energy in top {plan.rank}", "MIUB (nats)"),
    )
    body = [
        (
            row.method,
            shown(row.forgetting, signed=True),
            shown(row.effective_rank, digits=3),
            shown(row.stable_rank, digits=3),
            shown(row.energy_top_r, percent=True),
            shown(row.miub, digits=3),
        )
        for row in rows
    ]
    notes = (
        "forgetting: loss on what was pretrained, after minus before. The ranks and the energy are "
        "of the whole change of the weights, MIUB of what it leans on: means over the layers.",
    )
    return Table(f"{plan.name}: the change", header, body, notes)


def _cost(rows: Sequence[Row]) -> Table:
    header = ("method", "ms per step", "peak MiB", "trainable parameters")
    body = [
        (
            row.method,
            shown(row.seconds_a_step, scale=1e3, digits=3),
            shown(_without_error(row.peak_bytes), scale=2.0**-20),
            f"{row.trainable_parameters.mean:,.0f}" if row.trainable_parameters else NONE,
        )
        for row in rows
    ]
    notes = ("Time: median of a run. Memory: the most that tensors take at once in a step.",)
    return Table("What it costs", header, body, notes)


def _rates(plan: TaskPlan, rows: Sequence[Row]) -> Table:
    header = ("method", *(f"{rate:g}" for rate in plan.learning_rates))
    body = [
        (
            row.method if row.rate == 1 else f"{row.method} (rates × {row.rate:g})",
            *(
                f"{shown(found)}{' *' if rate == row.best else ''}"
                for rate, found in row.by_rate.items()
            ),
        )
        for row in rows
    ]
    notes = [f"Over {_seeds(len(plan.search_seeds))}. *: the best by {plan.metric}."]
    ends = [row.method for row in rows if _is_at_an_end(row)]
    if ends:
        notes.append(
            "The best is at an end of its range, and a better one may be outside: "
            f"{', '.join(ends)}."
        )
    return Table(f"{plan.name}: validation loss by learning rate", header, body, tuple(notes))


def _layers(rows: Sequence[Row]) -> Table:
    measured = [row for row in rows if row.miub_of_layers]
    layers = dict.fromkeys(layer for row in measured for layer in row.miub_of_layers)
    body = [
        (layer, *(shown(row.miub_of_layers.get(layer), digits=3) for row in measured))
        for layer in layers
    ]
    header = ("layer", *(row.method for row in measured))
    return Table("MIUB by layer (nats)", header, body, brief=False)


def shown(
    found: Statistic | None,
    *,
    digits: int = 4,
    scale: float = 1.0,
    signed: bool = False,
    percent: bool = False,
) -> str:
    """A mean ± its standard error, "diverged" where there is no mean."""
    if found is None:
        return NONE
    if found.diverged:
        all_of_them = found.diverged == found.n
        return "diverged" if all_of_them else f"diverged ({found.diverged} of {found.n})"
    sign = "+" if signed else ""
    if percent:
        text = f"{found.mean:{sign}.1%}"
        return text if found.stderr is None else f"{text} ± {100 * found.stderr:.1f}"
    value = scale * found.mean
    places = _places(value, digits)
    if found.stderr is None:
        return f"{value:{sign},.{places}f}"
    if found.stderr > 0:  # two digits of the error, as more of the mean say nothing
        places = min(places + 1, _places(scale * found.stderr, 2))
    return f"{value:{sign},.{places}f} ± {scale * found.stderr:,.{places}f}"


def _places(value: float, digits: int) -> int:
    """Decimals that show so many digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def _is_at_an_end(row: Row) -> bool:
    tried = list(row.by_rate)
    return len(tried) > 1 and row.best in (tried[0], tried[-1])


def _without_error(found: Statistic | None) -> Statistic | None:
    """Of what all seeds agree on but for a page or two."""
    return None if found is None else dataclasses.replace(found, stderr=None)


def _rate(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"× {value:.3g}" if math.isfinite(value) else "diverged"


def _arrival(row: Row) -> str:
    reached = row.steps_to_baseline.n if row.steps_to_baseline else 0
    if row.not_reached and not reached:
        return "not reached"
    text = shown(row.steps_to_baseline, digits=3)
    return f"{text} ({reached} of {reached + row.not_reached})" if row.not_reached else text


def _lacking(row: Row) -> str:
    said = [f"{row.failed} failed"] if row.failed else []
    said += [f"{row.missing} not run"] if row.missing else []
    return f"{row.method}: of {row.runs} runs {' and '.join(said)}; the figures are of the others."


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
