"""Trends over the runs: tables, fits, a picture."""

import math
import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scalora.plotting import new_figure, write_figure
from scalora.plotting.figures import SERIES, style

SHOWN = ("tempered, 0.01", "gaussian, 0.01", "club, 0.01", "infonce, 0.01")
MARKERS = ("o", "s", "^", "D")
UNITS = {"model size": "parameters", "complexity": "complexity (bits per byte)"}
PERMUTATIONS = 4000


def sweeps(runs: list, width: int, rank: int, text: str) -> dict[str, tuple[str, list]]:
    """Axis -> (the run's attribute, the runs in which nothing else changes)."""
    return {
        "rank": ("rank", [r for r in runs if r.width == width and r.text == text]),
        "model size": ("parameters", [r for r in runs if r.rank == rank and r.text == text]),
        "complexity": ("complexity", [r for r in runs if r.width == width and r.rank == rank]),
    }


def metrics(run) -> dict[str, float]:
    """Everything that a trend is asked of."""
    found = {"cross-entropy": run.cross_entropy, "perplexity": math.exp(run.cross_entropy)}
    for name, value in run.information.items():
        found[f"{name}, total"] = value
        found[f"{name}, per rank"] = value / run.rank
    return found


def ranked(values: list[float]) -> np.ndarray:
    """Ranks, equal values sharing their mean rank."""
    array = np.asarray(values, dtype=float)
    return np.array([(array < x).sum() + ((array == x).sum() - 1) / 2 for x in array])


def spearman(x: list[float], y: list[float]) -> tuple[float, float]:
    """Rank correlation, and the share of permutations in which it is as far from zero."""
    a, b = ranked(x) - (len(x) - 1) / 2, ranked(y) - (len(y) - 1) / 2
    scale = math.sqrt((a @ a) * (b @ b)) or 1.0
    rho = float(a @ b / scale)
    generator = np.random.default_rng(0)
    others = [abs(a @ generator.permutation(b)) / scale for _ in range(PERMUTATIONS)]
    at_least = sum(other >= abs(rho) - 1e-9 for other in others)
    return rho, (1 + at_least) / (1 + PERMUTATIONS)


def power_law(x: list[float], y: list[float]) -> dict[str, float]:
    """Fit ``y = a x^b``: b, its standard error, R^2, by least squares of the logarithms."""
    kept = [(math.log(p), math.log(q)) for p, q in zip(x, y, strict=True) if q > 0]
    if len(kept) < 3:
        return {"b": math.nan, "stderr": math.nan, "r2": math.nan}
    p, q = np.array(kept).T
    p = p - p.mean()
    b = float(p @ q / (p @ p))
    residual = q - q.mean() - b * p
    variance = float(residual @ residual) / (len(p) - 2)
    spread = float(((q - q.mean()) ** 2).sum())
    return {
        "b": b,
        "stderr": math.sqrt(variance / float(p @ p)),
        "r2": 1 - float(residual @ residual) / spread if spread else math.nan,
    }


def variation(runs: list, metric: str) -> float:
    """Standard deviation over the seeds relative to the mean: the median over configurations."""
    groups: dict[tuple, list[float]] = {}
    for run in runs:
        groups.setdefault((run.width, run.rank, run.text), []).append(metrics(run)[metric])
    spreads = [
        statistics.stdev(values) / abs(statistics.fmean(values))
        for values in groups.values()
        if len(values) > 1 and statistics.fmean(values)
    ]
    return statistics.median(spreads) if spreads else math.nan


def trends(found: dict[str, tuple[str, list]]) -> dict[str, dict]:
    """Metric -> for each axis rho, p and the fit; and the variation over seeds."""
    everything = list({id(r): r for _, runs in found.values() for r in runs}.values())
    result: dict[str, dict] = {}
    for metric in metrics(everything[0]):
        result[metric] = {"variation": variation(everything, metric)}
        for axis, (attribute, runs) in found.items():
            x = [float(getattr(run, attribute)) for run in runs]
            y = [metrics(run)[metric] for run in runs]
            rho, p = spearman(x, y)
            result[metric][axis] = {"rho": rho, "p": p, **power_law(x, y)}
    return result


def print_runs(runs: list, console: Console) -> None:
    """Print a row for each configuration: mean ± standard deviation over the seeds."""
    table = Table(title="Runs: mean ± sd over seeds; MIUB in nats, mean of the layers")
    for name in ("parameters", "rank", "text", "bits per byte", "cross-entropy", "perplexity"):
        table.add_column(name, justify="right")
    for name in SHOWN:
        table.add_column(name, justify="right")
        table.add_column("per rank", justify="right")
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault((run.parameters, run.rank, run.text), []).append(run)
    for (parameters, rank, text), same in groups.items():
        values = [metrics(run) for run in same]
        columns = ["cross-entropy", "perplexity"]
        columns += [f"{name}, {form}" for name in SHOWN for form in ("total", "per rank")]
        cells = [plus_minus([value[column] for value in values]) for column in columns]
        bits = f"{same[0].complexity:.2f}"
        table.add_row(f"{parameters:,}", str(rank), text, bits, *cells)
    Console(width=220, file=console.file).print(table)


def plus_minus(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def print_trends(found: dict[str, dict], axes: dict, console: Console) -> None:
    """Print the rank correlations; a star where the metric falls, p < 0.05."""
    table = Table(title="Trends: Spearman's rho (p), exponent b of a power law ± s.e. (R²)")
    table.add_column("metric", no_wrap=True)
    for axis, (_, runs) in axes.items():
        table.add_column(f"{axis}, {len(runs)} runs", justify="right")
        table.add_column("b", justify="right")
    table.add_column("sd / mean over seeds", justify="right")
    for metric, row in found.items():
        cells = []
        for axis in axes:
            trend = row[axis]
            star = " *" if trend["rho"] < 0 and trend["p"] < 0.05 else "  "
            cells.append(f"{trend['rho']:+.2f} ({trend['p']:.3f}){star}")
            cells.append(f"{trend['b']:+.2f} ± {trend['stderr']:.2f} ({trend['r2']:.2f})")
        table.add_row(metric, *cells, f"{100 * row['variation']:.1f} %")
    Console(width=180, file=console.file).print(table)
    console.print("* falls, p < 0.05: the trend that the MIUB paper reports.")


def plot(axes: dict[str, tuple[str, list]], path: Path) -> None:
    """Draw value and value per rank against each axis, a point per run."""
    with style():
        figure, panels = new_figure(8.5, 5.2, rows=2, columns=3, sharex="col", sharey="row")
        for column, (axis, (attribute, runs)) in enumerate(axes.items()):
            for row, form in enumerate(("total", "per rank")):
                panel = panels[row, column]
                for name, color, marker in zip(SHOWN, SERIES, MARKERS, strict=False):
                    x = [getattr(run, attribute) for run in runs]
                    y = [metrics(run)[f"{name}, {form}"] for run in runs]
                    panel.plot(x, y, marker, color=color, markersize=4.5, alpha=0.7, label=name)
                panel.set_yscale("log")
                if axis != "complexity":  # whose values lie close together
                    panel.set_xscale("log")
                    shown = sorted({getattr(run, attribute) for run in runs})
                    panel.set_xticks(shown, [number(value) for value in shown])
                    panel.set_xticks([], minor=True)
            panels[1, column].set_xlabel(UNITS.get(axis, axis))
            panels[0, column].set_title(axis)
        panels[0, 0].set_ylabel("MIUB (nats)")
        panels[1, 0].set_ylabel("MIUB / r (nats)")
        figure.legend(
            *panels[0, 0].get_legend_handles_labels(),
            title="estimator, noise tau",
            loc="outside right upper",
        )
        write_figure(figure, path)


def number(value: float) -> str:
    """Return a tick's label: millions of parameters, or the number itself."""
    return f"{value / 1e6:.2g} M" if value >= 1e5 else f"{value:.3g}"
