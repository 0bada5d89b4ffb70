"""Rows of data with named columns, from a file or a data set of the hub."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(source: str | Path) -> list[Row]:
    """Return the rows of a .csv or .jsonl file, gzipped or not; without such a file, of the hub.

    Raises:
        ValueError: neither a file nor a data set of the hub can be read, or the file is not what
            its name says.
    """
    path = Path(source)
    if not path.is_file():
        return _from_hub(str(source))
    kinds = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return _from_json_lines(path) if kinds[-1:] == [".jsonl"] else _from_csv(path)


def _from_csv(path: Path) -> list[Row]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _from_json_lines(path: Path) -> list[Row]:
    open_text = gzip.open if path.suffix == ".gz" else open
    rows = []
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path.name}, line {number}: not an object with columns")
            rows.append(row)
    return rows


def _from_hub(name: str) -> list[Row]:
    try:
        datasets = importlib.import_module("datasets")  # nothing of the package depends on it
    except ImportError as error:
        raise ValueError(
            f"{name}: no such file; for a data set of the hub, pip install datasets"
        ) from error
    try:
        return [dict(row) for row in datasets.load_dataset(name, split="train")]
    except Exception as error:  # its own kinds, the network's and the file system's
        raise ValueError(f"{name}: no such file, and no data set of the hub: {error}") from error
