"""GLUE's tasks, and their sentences out of the benchmark's own files or the hub's copy.

The files are tab-separated and know no quotes: a field may hold a single one. Test files have no
labels and are never read.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glue_metrics as metrics
from glue_metrics import Metric

# A wrong column of numbers would train as well, and silently.
STS_B_RANGE = (0.0, 5.0)


@dataclass(frozen=True)
class Task:
    """Names and columns of a task's files, and how it is scored.

    columns: of the one or two sentences. labels: as written in the files, in the order of their
    numbers; none for scores. metrics: the first is the one of the paper's table.
    """

    title: str
    folder: str
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: dict[str, Metric]
    dev: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] | None = None
    """Names for the columns of files that have none."""
    hub: tuple[str, ...] | None = None
    """The hub's names of the columns, where they differ."""
    drops: bool = False
    """True where lines with missing columns are known to occur; they are left out."""

    @property
    def outputs(self) -> int:
        """Return the number of the classifier's outputs: 1 for a score."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class Examples:
    """sentences: one or two columns of as many texts. labels: numbers of classes, or scores."""

    sentences: tuple[list[str], ...]
    labels: list[Any]


ACCURACY = {"accuracy": metrics.accuracy}
ACCURACY_F1 = {**ACCURACY, "F1": metrics.f1}
CORRELATIONS = {
    "correlation": metrics.pearson_spearman,
    "Pearson": metrics.pearson,
    "Spearman": metrics.spearman,
}
BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
PAIR = ("sentence1", "sentence2")
COLA = ("source", "label", "star", "sentence")
MRPC = ("#1 String", "#2 String")

TASKS = {
    "cola": Task(
        "CoLA", "CoLA", ("sentence",), "label", BINARY, {"Matthews": metrics.matthews}, header=COLA
    ),
    "sst2": Task("SST-2", "SST-2", ("sentence",), "label", BINARY, ACCURACY),
    "mrpc": Task("MRPC", "MRPC", MRPC, "Quality", BINARY, ACCURACY_F1, hub=PAIR),
    "stsb": Task("STS-B", "STS-B", PAIR, "score", (), CORRELATIONS),
    "qqp": Task(
        "QQP", "QQP", ("question1", "question2"), "is_duplicate", BINARY, ACCURACY_F1, drops=True
    ),
    "mnli": Task(
        "MNLI",
        "MNLI",
        PAIR,
        "gold_label",
        NLI,
        ACCURACY,
        dev=("dev_matched", "dev_mismatched"),
        hub=("premise", "hypothesis"),
    ),
    "qnli": Task("QNLI", "QNLI", ("question", "sentence"), "label", ENTAILMENT, ACCURACY),
    "rte": Task("RTE", "RTE", PAIR, "label", ENTAILMENT, ACCURACY),
}


def load(data: str, name: str) -> dict[str, Examples]:
    """Return a task's splits: "train", and "dev" or MNLI's two."""
    task = TASKS[name]
    if data == "hub":
        return from_hub(name)
    return {split: read(Path(data), task, split) for split in ("train", *task.dev)}


def read(data: Path, task: Task, split: str) -> Examples:
    """Read one file. What is wrong with it is said with its name and line."""
    path = data / task.folder / f"{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{task.folder}/{split}.tsv is not in --data; it should have GLUE's own folders "
            f"({', '.join(task.folder for task in TASKS.values())})"
        )
    sentences: tuple[list[str], ...] = tuple([] for _ in task.columns)
    labels: list[Any] = []
    for where, row in rows(path, task):
        labels.append(number(row[task.label], task, where))
        for column, texts in zip(task.columns, sentences, strict=True):
            texts.append(row[column])
    if not labels:
        raise ValueError(f"{task.folder}/{split}.tsv has no examples")
    return Examples(sentences, labels)


def rows(path: Path, task: Task) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a file's lines with where they are, as columns by name."""
    name = f"{path.parent.name}/{path.name}"
    needed = (*task.columns, task.label)
    # Only \n ends a line: sentences hold other characters that Python takes for line ends.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        header = list(task.header or next(file, "").rstrip("\r\n").split("\t"))
        missing = [column for column in needed if column not in header]
        if missing:
            raise ValueError(f"{name}: no column {' or '.join(map(repr, missing))} in {header}")
        first = 1 if task.header else 2
        for line_number, line in enumerate(file, first):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) == len(header):
                yield f"{name}, line {line_number}", dict(zip(header, fields, strict=True))
            elif not task.drops:
                raise ValueError(
                    f"{name}, line {line_number}: {len(fields)} columns, expected {len(header)}"
                )


def number(text: str, task: Task, where: str) -> int | float:
    """Return a label as a number."""
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{where}: the label {text!r} is not one of {', '.join(task.labels)}")
        return task.labels.index(text)
    low, high = STS_B_RANGE
    try:
        score = float(text)
    except ValueError:
        raise ValueError(f"{where}: the score {text!r} is not a number") from None
    if not low <= score <= high:
        raise ValueError(f"{where}: the score {text} is not between {low:g} and {high:g}")
    return score


def from_hub(name: str) -> dict[str, Examples]:
    """Return the same of the hub's copy, whose labels are numbers already."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise SystemExit("--data hub: pip install datasets; or give GLUE's folder") from None
    task = TASKS[name]
    splits = datasets.load_dataset("nyu-mll/glue", name)
    found = {}
    for split in ("train", *task.dev):
        part = splits[split.replace("dev", "validation")]
        sentences = tuple(list(part[column]) for column in task.hub or task.columns)
        found[split] = Examples(sentences, list(part["label"]))
    return found
