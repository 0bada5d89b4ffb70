"""Tables of results, for a terminal and as Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from scalora.ablation.plan import TaskPlan
from scalora.ablation.report.results import BASELINE, MethodResult
from scalora.ablation.statistics import Statistic

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is aligned to the left, the others to the right.

    Attributes:
        title, header, rows: cells of the header, and of each row.
        notes: paragraphs below.
        brief: whether a terminal shows it as well.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    brief: bool = True


def tables_of(plan: TaskPlan, results: Sequence[MethodResult]) -> list[Table]:
    """Return tables of scores, of the change, of costs, of losses by learning rate, and of MIUB."""
    tables = [
        _learning(plan, results),
        _change(plan, results),
        _cost(results),
        _rates(plan, results),
    ]
    return tables + ([_layers(results)] if any(r.miub_of_layers for r in results) else [])


def as_markdown(table: Table) -> str:
    """Return the table under its title, notes below."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    parts = [f"### {table.title}", _markdown(table.header, cells), "\n\n".join(table.notes)]
    return "\n\n".join(part for part in parts if part)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up in a terminal as well."""
    widths = [max(2, *map(len, column)) for column in zip(header, *rows, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(ruler), *map(line, rows)])


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


def _learning(plan: TaskPlan, results: Sequence[MethodResult]) -> Table:
    scores = list(dict.fromkeys(name for result in results for name in result.test))
    header = ("method", "rate", *(f"test {name}" for name in scores))
    compared = any(result.difference is not None for result in results)
    if compared:
        header += (f"{plan.metric} − LoRA's", "steps to LoRA's", "worst rate")
    body = []
    for result in results:
        cells = [
            result.method,
            _rate(result.best),
            *(shown(result.test.get(name)) for name in scores),
        ]
        if compared:
            cells += [
                NONE if result.method == BASELINE else shown(result.difference, signed=True),
                _arrival(result),
                _ratio(result.robustness),
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
    notes += [_lacking(result) for result in results if result.failed or result.missing]
    return Table(f"{plan.name}: learning", header, body, tuple(notes))


def _change(plan: TaskPlan, results: Sequence[MethodResult]) -> Table:
    header = (
        *("method", "forgetting", "effective rank", "stable rank"),
        *(f"energy in top {plan.rank}", "MIUB (nats)"),
    )
    body = [
        (
            result.method,
            shown(result.forgetting, signed=True),
            shown(result.effective_rank, digits=3),
            shown(result.stable_rank, digits=3),
            shown(result.energy_top_r, percent=True),
            shown(result.miub, digits=3),
        )
        for result in results
    ]
    notes = (
        "forgetting: loss on what was pretrained, after minus before. The ranks and the energy are "
        "those of the whole change of the weights; MIUB is how much it leans on the frozen model. "
        "All four are means over the layers.",
        "MIUB compares methods with as many coordinates alone: an adapter has r, a change that was "
        "folded up to 64.",
    )
    return Table(f"{plan.name}: the change", header, body, notes)


def _cost(results: Sequence[MethodResult]) -> Table:
    header = ("method", "ms per step", "peak MiB", "training state KiB", "trainable parameters")
    body = [
        (
            result.method,
            shown(result.seconds_a_step, scale=1e3, digits=3),
            shown(_without_error(result.peak_bytes), scale=2.0**-20),
            shown(_without_error(result.state_bytes), scale=2.0**-10),
            f"{result.trainable_parameters.mean:,.0f}" if result.trainable_parameters else NONE,
        )
        for result in results
    ]
    notes = (
        "Time: median of a run. Peak: the most that tensors take at one time in a step. Training "
        "state: what training adds to the model between two steps (adapter, carry, gradients, "
        "optimizer state).",
    )
    return Table("What it costs", header, body, notes)


def _rates(plan: TaskPlan, results: Sequence[MethodResult]) -> Table:
    header = ("method", *(f"{rate:g}" for rate in plan.learning_rates))
    body = [
        (
            result.method if result.rate == 1 else f"{result.method} (rates × {result.rate:g})",
            *(
                f"{shown(found)}{' *' if rate == result.best else ''}"
                for rate, found in result.by_rate.items()
            ),
        )
        for result in results
    ]
    notes = [f"Over {_seeds(len(plan.search_seeds))}. *: the best by {plan.metric}."]
    ends = [result.method for result in results if _is_at_an_end(result)]
    if ends:
        notes.append(
            "The best is at an end of its range, and a better one may be outside: "
            f"{', '.join(ends)}."
        )
    return Table(f"{plan.name}: validation loss by learning rate", header, body, tuple(notes))


def _layers(results: Sequence[MethodResult]) -> Table:
    measured = [result for result in results if result.miub_of_layers]
    layers = dict.fromkeys(layer for result in measured for layer in result.miub_of_layers)
    body = [
        (layer, *(shown(result.miub_of_layers.get(layer), digits=3) for result in measured))
        for layer in layers
    ]
    header = ("layer", *(result.method for result in measured))
    return Table("MIUB by layer (nats)", header, body, brief=False)


def shown(
    found: Statistic | None,
    *,
    digits: int = 4,
    scale: float = 1.0,
    signed: bool = False,
    percent: bool = False,
) -> str:
    """Return a mean ± its standard error as text, "diverged" where there is no mean.

    Args:
        found: the statistic.
        digits: significant digits of a mean without an error.
        scale: factor of both numbers.
        signed: whether a positive mean gets a sign.
        percent: whether both are shares, shown in percent.
    """
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
    if found.stderr > 0:  # the mean ends at the error's second digit
        places = min(places + 1, _places(scale * found.stderr, 2))
    return f"{value:{sign},.{places}f} ± {scale * found.stderr:,.{places}f}"


def _places(value: float, digits: int) -> int:
    """Return the decimals that show this number of significant digits."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    return min(6, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def _is_at_an_end(result: MethodResult) -> bool:
    tried = list(result.by_rate)
    return len(tried) > 1 and result.best in (tried[0], tried[-1])


def _without_error(found: Statistic | None) -> Statistic | None:
    """Return the statistic without its error: seeds differ by a page of memory or two."""
    return None if found is None else dataclasses.replace(found, stderr=None)


def _rate(rate: float | None) -> str:
    return NONE if rate is None else f"{rate:g}"


def _ratio(value: float | None) -> str:
    if value is None:
        return NONE
    return f"× {value:.3g}" if math.isfinite(value) else "diverged"


def _arrival(result: MethodResult) -> str:
    reached = result.steps_to_baseline.n if result.steps_to_baseline else 0
    if result.not_reached and not reached:
        return "not reached"
    text = shown(result.steps_to_baseline, digits=3)
    return f"{text} ({reached} of {reached + result.not_reached})" if result.not_reached else text


def _lacking(result: MethodResult) -> str:
    lacking = [f"{result.failed} failed"] if result.failed else []
    lacking += [f"{result.missing} not run"] if result.missing else []
    of_runs = f"of {result.runs} runs {' and '.join(lacking)}"
    return f"{result.method}: {of_runs}; the figures are of the others."


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
