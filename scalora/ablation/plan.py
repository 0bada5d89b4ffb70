"""Which runs an ablation is made of: first a search over learning rates, then the other seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalora.ablation.job import Job
from scalora.ablation.record import Record
from scalora.ablation.summary import best_rate
from scalora.files import write_bytes

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class TaskPlan:
    """Methods, learning rates and seeds on one task.

    Attributes:
        task, options, source_code, steps, rank, device: as in :class:`~scalora.ablation.job.Job`.
        name: what the task calls itself.
        metric, lower_is_better: what the task's learning rates are chosen by.
        methods: each by its one name.
        rates: each method's factor of the learning rates, in the same order.
        learning_rates: what every method is tried at, its factor not applied, ascending.
        seeds: of all runs.
        search_seeds: those that run every learning rate; the others run each method's best.
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
        """Of both stages."""
        rest = len(self.seeds) - len(self.search_seeds)
        return len(self.methods) * (len(self.learning_rates) * len(self.search_seeds) + rest)

    def job(self, method: str, learning_rate: float, seed: int) -> Job:
        """The run of a method at one of the plan's learning rates, its factor not applied."""
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
        """Every method at every learning rate, for the seeds of the search.

        A seed's whole grid comes before the next seed's, so that a search that is stopped has
        something on every method.
        """
        return [
            self.job(method, learning_rate, seed)
            for seed in self.search_seeds
            for method in self.methods
            for learning_rate in self.learning_rates
        ]

    def best_rates(self, records: Mapping[Job, Record]) -> dict[str, float | None]:
        """Method -> the learning rate, factor not applied, that validation chooses; None: none."""
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
        """Every method at its best learning rate, for the seeds that are left."""
        best = self.best_rates(records)
        left = [seed for seed in self.seeds if seed not in self.search_seeds]
        return [
            self.job(method, learning_rate, seed)
            for seed in left
            for method, learning_rate in best.items()
            if learning_rate is not None
        ]


def scaled(learning_rate: float, factor: float) -> float:
    """Their product to six digits: 0.001 times 0.1 is 0.0001."""
    return float(f"{learning_rate * factor:.6g}")


def write_plan(plans: Sequence[TaskPlan], folder: Path) -> None:
    """Keep what ``--report-only`` goes by."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps([asdict(plan) for plan in plans], indent=1)
    write_bytes(folder / PLAN_FILE, content.encode("utf-8"))


def read_plan(folder: Path) -> list[TaskPlan]:
    """The plans of the last command in a folder.

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
