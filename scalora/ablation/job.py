"""One training run: all that its result depends on, and the name of its record."""

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
        options: the task's options that were given, (name, value).
        method: its name, as ``method_of(spec).name``.
        learning_rate: the method's own, its factor applied.
        seed: seed of the new head, the adapters, the batches and dropout.
        steps: training steps.
        rank: r of the adapters.
        device: "cpu" or "cuda"; time and memory depend on it.
        source_code: a digest of the file of a user's own task; "" for an embedded task.
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
        """Return the task's name, or the class of a user's own."""
        return self.task.rpartition(":")[2]

    @property
    def file_name(self) -> str:
        """Return the record's file name: readable, and a digest of every field."""
        readable = f"{self.task_name}_{self.method}_lr{self.learning_rate:g}_seed{self.seed}"
        return f"{_plain(readable)[-100:]}_{digest(asdict(self))}.json"


def digest(fields: Any) -> str:
    """Return ten hexadecimal digits of anything that JSON can say."""
    canonical = json.dumps(fields, sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:10]


def digest_of_source(task: str) -> str:
    """Return the digest of the file in "path.py:Class", "" for an embedded task.

    An edited task is another task, with runs of its own.
    """
    path = Path(task.rpartition(":")[0] or task)
    is_file = path.suffix == ".py" and path.is_file()
    return digest(path.read_text("utf-8")) if is_file else ""


def folder_of_task(job: Job) -> str:
    """Return the name of the folder of what a task keeps between commands."""
    name = _plain(job.task_name)
    made_with = [job.task, job.options, job.source_code]
    return f"{name}-{digest(made_with)}" if job.options or job.source_code else name


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+_-]+", "-", name).strip("-.")
