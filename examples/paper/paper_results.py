"""What the runs gave: kept in a file after each, and set beside the paper's numbers."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paper_configuration import Configuration
from rich.console import Console
from rich.table import Table

# One learning rate's runs of a task: its seeds' scores, in percent.
Scores = tuple[float, list[float]]


class Results:
    """The runs of a file. A run that is in it is not done again, one that is broken off is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            try:
                self.runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not a file of results; give another --output") from error

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the run with exactly these settings."""
        return next((run for run in self.runs if run["settings"] == settings), None)

    def add(self, settings: dict[str, Any], scores: dict[str, float], details: Any) -> None:
        """Keep a run, and write the file anew; whoever stops this finds the old or the new one."""
        self.runs.append({"settings": settings, "scores": scores, "details": details})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text(json.dumps({"runs": self.runs}, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Scores]:
    """Return for each task the scores at the learning rate that is best on average.

    Runs are of one row. What was trained together shares one learning rate.
    """
    trained: dict[str, dict[float, list[dict[str, float]]]] = {}
    for run in runs:
        rates = trained.setdefault(run["settings"]["task"], {})
        rates.setdefault(run["settings"]["learning_rate"], []).append(run["scores"])
    found: dict[str, Scores] = {}
    for rates in trained.values():
        rate = max(rates, key=lambda rate: statistics.fmean(_all(rates[rate])))
        for task in rates[rate][0]:
            found[task] = rate, [scores[task] for scores in rates[rate]]
    return found


def _all(scores: Iterable[dict[str, float]]) -> list[float]:
    return [value for run in scores for value in run.values()]


def print_table(
    rows: Sequence[Configuration],
    runs: dict[str, list[dict[str, Any]]],
    tasks: dict[str, str],
    changes: str,
    console: Console,
) -> None:
    """Print ours beside the paper's, the rows of a task under each other.

    runs: row -> its runs. tasks: task -> its name and metric, as printed. changes: what the
    command line changed.
    """
    table = Table(title="Scores in percent")
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for head in ("ours", "±", "seeds", "lr", "paper"):
        table.add_column(head, justify="right")
    found = {row.row: best(runs[row.row]) for row in rows}
    shown = {task for scores in found.values() for task in scores}
    for task, label in tasks.items():
        if task not in shown:
            continue
        for i, row in enumerate(rows):
            title = "" if i else label
            table.add_row(title, row.row, *cells(found[row.row].get(task)), reported(row, task))
        table.add_section()
    for i, row in enumerate(rows):
        title = "" if i else "average"
        table.add_row(title, row.row, *average(found[row.row], tasks), reported(row, "average"))
    console.print(table)
    console.print(
        "±: standard deviation over seeds. lr: learning rate, the best one on the data that is\n"
        "reported, for every row alike; nothing else is chosen by it. Average: of all tasks, or\n"
        "not given.",
        style="dim",
    )
    if changes:
        console.print(f"Not the rows' own settings: {changes}", style="bold")


def cells(scores: Scores | None) -> tuple[str, str, str, str]:
    """Say a task's mean, its spread, how many seeds and which learning rate."""
    if scores is None:
        return "", "", "0", ""
    rate, values = scores
    spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}", spread, f"{len(values)}", f"{rate:g}"


def average(found: dict[str, Scores], tasks: Iterable[str]) -> tuple[str, str, str, str]:
    """Say the mean of all tasks; of some of them it would not compare with anything."""
    if any(task not in found for task in tasks):
        return "", "", "", ""
    fewest = min(len(values) for _, values in found.values())
    mean = statistics.fmean(statistics.fmean(found[task][1]) for task in tasks)
    return f"{mean:.2f}", "", f"{fewest}", ""


def reported(row: Configuration, task: str) -> str:
    return f"{row.reported[task]:.2f}" if task in row.reported else ""
