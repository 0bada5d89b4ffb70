"""The report of an ablation: tables, pictures, Markdown, a page and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from scalora.ablation.job import Job
from scalora.ablation.plan import TaskPlan
from scalora.ablation.record import Record
from scalora.ablation.report.page import as_page
from scalora.ablation.report.pictures import draw_pictures
from scalora.ablation.report.results import MethodResult, results_of
from scalora.ablation.report.tables import as_markdown, print_table, tables_of
from scalora.files import write_bytes

RESULTS_JSON, RESULTS_MARKDOWN, RESULTS_PAGE = "results.json", "results.md", "results.html"

Compared = Sequence[tuple[TaskPlan, list[MethodResult]]]


def report(
    plans: Sequence[TaskPlan], records: Mapping[Job, Record], output: Path, console: Console
) -> bool:
    """Print tables, write all files of the report, and return whether no run failed."""
    compared = [(plan, results_of(plan, records)) for plan in plans]
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / RESULTS_JSON, as_json(compared, records))
    pictures: dict[str, list[str]] = {}
    for plan, results in compared:
        for table in tables_of(plan, results):
            if table.brief:
                print_table(table, console)
        drawn = _draw(plan, results, output / plan.name, console)
        pictures[plan.name] = [path.relative_to(output).as_posix() for path in drawn]
    text = as_text(compared, records, pictures)
    write_bytes(output / RESULTS_MARKDOWN, text.encode("utf-8"))
    write_bytes(output / RESULTS_PAGE, as_page(text, output).encode("utf-8"))
    failed = [record for record in records.values() if record.status == "failed"]
    for text in failures(failed):
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    return not failed


def _draw(
    plan: TaskPlan, results: list[MethodResult], folder: Path, console: Console
) -> list[Path]:
    try:
        return draw_pictures(plan, results, folder)
    except ImportError as error:
        console.print(f"No pictures: {error}", markup=False, soft_wrap=True)
        return []


def failures(failed: Sequence[Record]) -> list[str]:
    """Return one line per failed run: which one, and its exception."""
    return [
        f"failed: {record.job.task_name} {record.job.method} lr={record.job.learning_rate:g} "
        f"seed={record.job.seed}: {(record.error or '').partition(chr(10))[0]}"
        for record in failed
    ]


def as_json(compared: Compared, records: Mapping[Job, Record]) -> bytes:
    """Return plans and results as JSON; a number that is not finite is null."""
    content = [
        {
            "plan": asdict(plan),
            "methods": [_fields(result) for result in results],
            "runs": sorted(job.file_name for job in records if job.task == plan.task),
        }
        for plan, results in compared
    ]
    return json.dumps(_finite({"tasks": content}), indent=1, allow_nan=False).encode("utf-8")


def as_text(
    compared: Compared, records: Mapping[Job, Record], pictures: Mapping[str, Sequence[str]]
) -> str:
    """Return Markdown with one section per task.

    Args:
        compared: plans and their results.
        records: every run's.
        pictures: name of a task -> paths of its pictures, beside the file.
    """
    parts = ["# Ablation"]
    for plan, results in compared:
        parts.append(f"## {plan.name}")
        parts += [as_markdown(table) for table in tables_of(plan, results)]
        parts += [f"![{_title(path)}]({path})" for path in pictures[plan.name]]
        own = [record for job, record in records.items() if job.task == plan.task]
        parts.append(_made_with(own))
    lines = failures([record for record in records.values() if record.status == "failed"])
    if lines:
        parts += ["## Failed", "\n".join(f"* {text}" for text in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(path: str) -> str:
    return Path(path).stem.replace("-", " ").capitalize()


def _made_with(records: Sequence[Record]) -> str:
    """Return the machines and versions of the runs, and say so where they differ."""
    found = sorted(
        {
            f"{record.device_name}, {record.threads} thread{'s'[: record.threads != 1]}; "
            + ", ".join(f"{name} {version}" for name, version in record.versions.items())
            for record in records
            if record.device_name
        }
    )
    if len(found) < 2:
        return "\n".join(found)
    mixed = "The runs are not all of one machine and one set of versions:"
    return "\n".join([mixed, "", *(f"* {one}" for one in found)])


def _fields(result: MethodResult) -> dict[str, Any]:
    fields = asdict(result)
    fields["by_rate"] = [
        {"learning_rate": rate, "validation_loss": found}
        for rate, found in fields["by_rate"].items()
    ]
    return fields


def _finite(content: Any) -> Any:
    """Return the content with None for every number that is not finite."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
