"""The runs of an ablation: first a search over learning rates, then the other seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalora.ablation.job import Job
from scalora.ablation.record import Record
from scalora.ablation.statistics import best_rate
from scalora.files import write_bytes

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class TaskPlan:
    """Methods, learning rates and seeds on one task.

    Attributes:
        task, options, source_code, steps, rank, device: as in :class:`~scalora.ablation.job.Job`.
        name: the task's own name.
        metric, lower_is_better: the score that learning rates are chosen by.
        methods: names of methods.
        rates: each method's factor of the learning rates, in the same order.
        learning_rates: those that every method is tried at, its factor not applied, ascending.
        seeds: seeds of all runs.
        search_seeds: seeds that run every learning rate; the others run each method's best.
    """

    task: str
    name: str
    options: tuple[tuple[str, str], ...]
    source_code: str
    metric: str
    lower_is_better: bool
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    search_seeds: tuple[int, ...]
    steps: int
    rank: int
    device: str

    @property
    def number_of_runs(self) -> int:
        """Return the number of runs of both stages."""
        rest = len(self.seeds) - len(self.search_seeds)
        return len(self.methods) * (len(self.learning_rates) * len(self.search_seeds) + rest)

    def job(self, method: str, learning_rate: float, seed: int) -> Job:
        """Return the run of a method at one of the plan's learning rates, factor not applied."""
        rate = self.rates[self.methods.index(method)]
        return Job(
            task=self.task,
            method=method,
            learning_rate=scaled(learning_rate, rate),
            seed=seed,
            steps=self.steps,
            rank=self.rank,
            device=self.device,
            options=self.options,
            source_code=self.source_code,
        )

    def search(self) -> list[Job]:
        """Return every method at every learning rate, for the seeds of the search.

        A seed's whole grid comes before the next seed's, so that a search that is stopped has runs
        of every method.
        """
        return [
            self.job(method, learning_rate, seed)
            for seed in self.search_seeds
            for method in self.methods
            for learning_rate in self.learning_rates
        ]

    def best_rates(self, records: Mapping[Job, Record]) -> dict[str, float | None]:
        """Return, by method, the learning rate (factor not applied) that validation chooses."""
        return {
            method: best_rate(
                {
                    learning_rate: [
                        records.get(self.job(method, learning_rate, seed))
                        for seed in self.search_seeds
                    ]
                    for learning_rate in self.learning_rates
                },
                self.metric,
                self.lower_is_better,
            )
            for method in self.methods
        }

    def rest(self, records: Mapping[Job, Record]) -> list[Job]:
        """Return every method at its best learning rate, for the seeds beyond the search."""
        best = self.best_rates(records)
        left = [seed for seed in self.seeds if seed not in self.search_seeds]
        return [
            self.job(method, learning_rate, seed)
            for seed in left
            for method, learning_rate in best.items()
            if learning_rate is not None
        ]


def scaled(learning_rate: float, factor: float) -> float:
    """Return the product to six digits: 0.001 times 0.1 is 0.0001."""
    return float(f"{learning_rate * factor:.6g}")


def write_plan(plans: Sequence[TaskPlan], folder: Path) -> None:
    """Write the plans, which ``--report-only`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps([asdict(plan) for plan in plans], indent=1)
    write_bytes(folder / PLAN_FILE, content.encode("utf-8"))


def read_plan(folder: Path) -> list[TaskPlan]:
    """Return the plans of the last command in a folder.

    Raises:
        ValueError: there are none.
    """
    try:
        content = json.loads((folder / PLAN_FILE).read_text("utf-8"))
        return [_plan(entry) for entry in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no ablation ({PLAN_FILE} cannot be read).") from error


def _plan(entry: dict[str, Any]) -> TaskPlan:
    known = {field.name: entry[field.name] for field in fields(TaskPlan)}
    tuples = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return TaskPlan(
        **{**known, **tuples, "options": tuple((name, value) for name, value in entry["options"])}
    )
