"""The runs of plans that are not done yet: the search, then the other seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from scalora.ablation.engines import Engine
from scalora.ablation.job import Job
from scalora.ablation.plan import TaskPlan
from scalora.ablation.progress import RunProgress
from scalora.ablation.record import Record, read_records, write_record
from scalora.ablation.run import prepare_only, run_and_record

RUNS_FOLDER = "runs"


def run_plans(
    plans: Sequence[TaskPlan], engine: Engine, output: Path, cache: Path, console: Console
) -> dict[Job, Record]:
    """Return the record of every run of the plans; run those that are not done.

    Args:
        plans: one per task.
        engine: runs the jobs.
        output: records are read from and written to ``output``/runs.
        cache: folder of what tasks prepare.
        console: shows the progress.
    """
    folder = output / RUNS_FOLDER
    records: dict[Job, Record] = {}
    with engine, RunProgress(console, sum(plan.number_of_runs for plan in plans)) as progress:
        for stage in (TaskPlan.search, functools.partial(TaskPlan.rest, records=records)):
            jobs = [job for plan in plans for job in stage(plan)]
            records |= read_records(jobs, folder)
            left = [job for job in jobs if job not in records or not records[job].done]
            progress.skip(len(jobs) - len(left))
            for record in _run(left, engine, folder, cache, progress):
                records[record.job] = record
                progress.advance(record)
    return records


def recorded(plans: Sequence[TaskPlan], output: Path) -> dict[Job, Record]:
    """Return the records of the plans' runs that are there; nothing is run."""
    folder = output / RUNS_FOLDER
    records = read_records((job for plan in plans for job in plan.search()), folder)
    return records | read_records((job for plan in plans for job in plan.rest(records)), folder)


def _run(
    jobs: Sequence[Job], engine: Engine, folder: Path, cache: Path, progress: RunProgress
) -> Iterator[Record]:
    """Prepare every task once, in one process, then run the jobs."""
    first_of_tasks = list({(job.task, job.options): job for job in jobs}.values())
    for job in first_of_tasks:
        progress.prepare(job.task_name)
    preparing = functools.partial(prepare_only, cache=cache)
    prepared = dict(engine.run(preparing, first_of_tasks))
    unprepared = {job.task: record for job, record in prepared.items() if not record.done}
    for job in jobs:
        if job.task in unprepared:
            record = dataclasses.replace(unprepared[job.task], job=job)
            write_record(record, folder)
            yield record
    ready = [job for job in jobs if job.task not in unprepared]
    working = functools.partial(run_and_record, cache=cache, records=folder)
    for _, record in engine.run(working, ready):
        if not record.done:  # its process may not have lived to write it
            write_record(record, folder)
        yield record
