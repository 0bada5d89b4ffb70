"""Progress of an ablation: a bar with the time left, or one line per run in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scalora.ablation.record import Record

_PERIOD = 24 * 3600.0  # seconds: runs differ, so the speed is the mean of all so far


class RunProgress:
    """Counts runs.

    Args:
        console: gets a bar if it is a terminal, else plain lines.
        total: number of runs.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._ended = 0
        self._begun = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=_PERIOD,
            transient=True,
        )
        self._task = self._bar.add_task("runs", total=total)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def prepare(self, task: str) -> None:
        """Say that a task is prepared now, which may take minutes where nothing is cached."""
        self._bar.update(self._task, description=f"preparing {task}")
        if not self._console.is_terminal:
            self._print(f"preparing {task}")

    def skip(self, runs: int) -> None:
        """Leave out runs that were done before."""
        self._total -= runs
        self._bar.update(self._task, total=self._total)
        if runs:
            self._print(f"{runs} runs were done before and are not run again")

    def advance(self, record: Record) -> None:
        """Count a run that has ended."""
        self._ended += 1
        self._bar.update(self._task, completed=self._ended, description=_name(record))
        if not self._console.is_terminal:
            left = self._total - self._ended
            time_left = f", {_duration(self._seconds_left())} left" if left else ""
            self._print(f"[{self._ended}/{self._total}] {line(record)}{time_left}")
        elif record.status != "ok":
            self._print(line(record))

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _seconds_left(self) -> float:
        seconds = (time.monotonic() - self._begun) / self._ended
        return seconds * (self._total - self._ended)


def line(record: Record) -> str:
    """Return a run's outcome in one line."""
    return f"{_name(record)}: {_outcome(record)}, {_duration(record.wall_seconds)}"


def _name(record: Record) -> str:
    job = record.job
    return f"{job.task_name} {job.method} lr={job.learning_rate:g} seed={job.seed}"


def _outcome(record: Record) -> str:
    if record.status == "failed":
        return f"failed: {(record.error or '').partition(chr(10))[0]}"
    if record.status == "diverged":
        return f"diverged by step {record.diverged_at}"
    return "validation " + ", ".join(f"{k} {v:.4g}" for k, v in record.validation.items())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
