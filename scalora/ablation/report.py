"""What an ablation leaves behind: tables, a JSON file and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from scalora.ablation.job import Job
from scalora.ablation.pictures import draw_pictures
from scalora.ablation.plan import TaskPlan
from scalora.ablation.record import Record
from scalora.ablation.rows import Row, rows_of
from scalora.ablation.tables import as_markdown, print_table, tables_of
from scalora.files import write_bytes

RESULTS_JSON, RESULTS_MARKDOWN = "results.json", "results.md"


def report(
    plans: Sequence[TaskPlan], records: Mapping[Job, Record], output: Path, console: Console
) -> bool:
    """Print tables and write results.json, results.md and the pictures; whether no run failed."""
    results = [(plan, rows_of(plan, records)) for plan in plans]
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / RESULTS_JSON, as_json(results, records))
    pictures: dict[str, list[str]] = {}
    for plan, rows in results:
        for table in tables_of(plan, rows):
            if table.brief:
                print_table(table, console)
        drawn = _draw(plan, rows, output / plan.name, console)
        pictures[plan.name] = [path.relative_to(output).as_posix() for path in drawn]
    text = as_text(results, records, pictures)
    write_bytes(output / RESULTS_MARKDOWN, text.encode("utf-8"))
    failed = [record for record in records.values() if record.status == "failed"]
    for text in failures(failed):
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    return not failed


def _draw(plan: TaskPlan, rows: list[Row], folder: Path, console: Console) -> list[Path]:
    try:
        return draw_pictures(plan, rows, folder)
    except ImportError:
        text = "No pictures: matplotlib is not installed (pip install scalora[plot])."
        console.print(text, markup=False)
        return []


def failures(failed: Sequence[Record]) -> list[str]:
    """What each failed run raised, in a line."""
    return [
        f"failed: {record.job.task_name} {record.job.method} lr={record.job.learning_rate:g} "
        f"seed={record.job.seed}: {(record.error or '').partition(chr(10))[0]}"
        for record in failed
    ]


def as_json(results: Sequence[tuple[TaskPlan, list[Row]]], records: Mapping[Job, Record]) -> bytes:
    """Plans and rows; null where there is no finite number."""
    content = [
        {
            "plan": asdict(plan),
            "methods": [_row(row) for row in rows],
            "runs": sorted(job.file_name for job in records if job.task == plan.task),
        }
        for plan, rows in results
    ]
    return json.dumps(_finite({"tasks": content}), indent=1, allow_nan=False).encode("utf-8")


def as_text(
    results: Sequence[tuple[TaskPlan, list[Row]]],
    records: Mapping[Job, Record],
    pictures: Mapping[str, Sequence[str]],
) -> str:
    """Markdown: a section a task.

    pictures: name of a task -> their paths beside the file.
    """
    parts = ["# Ablation"]
    for plan, rows in results:
        parts.append(f"## {plan.name}")
        parts += [as_markdown(table) for table in tables_of(plan, rows)]
        parts += [f"![{Path(path).stem}]({path})" for path in pictures[plan.name]]
        own = [record for job, record in records.items() if job.task == plan.task]
        parts.append(_made_with(own))
    lines = failures([record for record in records.values() if record.status == "failed"])
    if lines:
        parts += ["## Failed", "\n".join(f"* {text}" for text in lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made_with(records: Sequence[Record]) -> str:
    """The machines and versions that runs are of, and a word where they are not all alike."""
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


def _row(row: Row) -> dict[str, Any]:
    fields = asdict(row)
    fields["by_rate"] = [
        {"learning_rate": rate, "validation_loss": found}
        for rate, found in fields["by_rate"].items()
    ]
    return fields


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
