"""CSV and JSON of a report."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miub.report.rows import LayerRow, LayerRows

_COLUMNS = (
    *("step", "layer", "adapter", "kind", "coordinates", "value", "per_coordinate", "stderr"),
    *("lower", "tokens", "rebased", "steps", "not_a_number"),
)


def as_csv(report: LayerRows) -> bytes:
    """Return one line per layer and step, oldest first; cells without a number are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("estimator", "noise", *_COLUMNS))
    for row in sorted(_measurements(report), key=lambda row: row.step):
        cells = (getattr(row, column) for column in _COLUMNS)
        writer.writerow((report.estimator, report.noise, *map(_csv_cell, cells)))
    return text.getvalue().encode("utf-8")


def as_json(report: LayerRows) -> bytes:
    """Return all that the report holds; null where there is no finite number."""
    content = {
        "estimator": report.estimator,
        "noise": report.noise,
        "unit": "nats",
        "mean": report.mean,
        "total": report.total,
        "mean_per_coordinate": report.mean_per_coordinate,
        "kinds": [
            {"adapter": adapter, "kind": kind, **total._asdict()}
            for adapter in report.adapters
            for kind, total in report.by_kind(adapter).items()
        ],
        "rows": [_fields(row) for row in report],
        "history": [_fields(row) for row in _measurements(report)],
    }
    return json.dumps(_without_nan(content), indent=1, allow_nan=False).encode("utf-8")


def read_json(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], str, float]:
    """Return the history that `as_json` wrote, as fields of rows, the estimator and the noise.

    Raises:
        ValueError: the file is not such a report.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        rows = [
            {
                **{name: field for name, field in row.items() if name != "per_coordinate"},
                **{name: _number(row[name]) for name in ("value", "stderr", "lower")},
            }
            for row in content["history"]
        ]
        if not rows:
            raise ValueError("it has no rows")
        return rows, content["estimator"], content["noise"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a report that MIUBReport.to_json wrote.") from error


def _measurements(report: LayerRows) -> Iterable[LayerRow]:
    return (row for rows in report.history.values() for row in rows)


def _fields(row: LayerRow) -> dict[str, Any]:
    return {**asdict(row), "per_coordinate": row.per_coordinate}


def _csv_cell(cell: Any) -> Any:
    return "" if isinstance(cell, float) and math.isnan(cell) else cell


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _number(field: float | None) -> float:
    return math.nan if field is None else field
