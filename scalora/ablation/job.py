"""One training run: all that its result depends on, and what its record is called."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A method on a task at a learning rate and a seed.

    Attributes:
        task: as ``--task`` spells it.
        options: of the task, (name, value) of those that were given.
        method: its one name, as ``method_of(spec).name``.
        learning_rate: the method's own, its factor applied.
        seed: of the new head, the adapters, the batches and dropout.
        steps: training steps.
        rank: r of the adapters.
        device: "cpu" or "cuda"; what a step costs depends on it.
        source_code: a digest of the file that a task of the user's own is in; "" for ours.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    rank: int
    device: str = "cpu"
    options: tuple[tuple[str, str], ...] = ()
    source_code: str = ""

    @property
    def task_name(self) -> str:
        """The task's name, or the class of a user's own."""
        return self.task.rpartition(":")[2]

    @property
    def file_name(self) -> str:
        """Readable, and by its digest of every field unlike that of any other settings."""
        readable = f"{self.task_name}_{self.method}_lr{self.learning_rate:g}_seed{self.seed}"
        return f"{_plain(readable)[-100:]}_{digest(asdict(self))}.json"


def digest(fields: Any) -> str:
    """Ten hexadecimal digits that tell apart what JSON can say."""
    canonical = json.dumps(fields, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:10]


def digest_of_source(task: str) -> str:
    """Of the file in "path.py:Class", "" for another task.

    An edited task is another task: its runs are not those of the file as it was.
    """
    path = Path(task.rpartition(":")[0] or task)
    is_file = path.suffix == ".py" and path.is_file()
    return digest(path.read_text("utf-8")) if is_file else ""


def folder_of_task(job: Job) -> str:
    """Of what a task keeps between commands: its name, and a digest of what it was made with."""
    name = _plain(job.task_name)
    made_with = [job.task, job.options, job.source_code]
    return f"{name}-{digest(made_with)}" if job.options or job.source_code else name


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+_-]+", "-", name).strip("-.")
