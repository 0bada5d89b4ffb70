"""Eight commonsense tasks in the files that they are published in, as options to choose from.

A question is a list of options, each a prompt and how it continues; the prompts of a question are
the same but for WinoGrande, where the option stands in the middle and the rest of the sentence is
what continues it. The templates are those that evaluation harnesses use for these tasks.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """options: prompt and continuation of each. answer: which one is right."""

    options: list[tuple[str, str]]
    answer: int


@dataclass(frozen=True)
class Task:
    """train, held_out: files in the task's folder; with labels apart, those as well."""

    title: str
    folder: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    question: Callable[[dict[str, Any]], Question]
    first_label: int = 0
    """What labels that are in a file of their own begin at."""


def boolq(record: dict[str, Any]) -> Question:
    if not isinstance(record["answer"], bool):
        raise ValueError(f"'answer' is {record['answer']!r}, not true or false")
    prompt = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return same_prompt(prompt, ["no", "yes"], int(record["answer"]))


def piqa(record: dict[str, Any]) -> Question:
    prompt = f"Question: {record['goal']}\nAnswer:"
    return same_prompt(prompt, [record["sol1"], record["sol2"]], record["label"])


def siqa(record: dict[str, Any]) -> Question:
    prompt = f"Question: {record['context']} {record['question']}\nAnswer:"
    options = [record[f"answer{letter}"] for letter in "ABC"]
    return same_prompt(prompt, options, record["label"])


def hellaswag(record: dict[str, Any]) -> Question:
    prompt = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = [without_markup(ending) for ending in record["endings"]]
    return same_prompt(without_markup(prompt), endings, record["label"])


def without_markup(text: str) -> str:
    """Drop what WikiHow's part of HellaSwag has in brackets: [header], [step], [title]."""
    text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". "))
    return re.sub(" +", " ", text).strip()


def winogrande(record: dict[str, Any]) -> Question:
    before, gap, after = record["sentence"].partition("_")
    if not gap:
        raise ValueError(f"no gap '_' in the sentence {record['sentence']!r}")
    options = [record["option1"], record["option2"]]
    pairs = [(before + option, " " + after.strip()) for option in options]
    return Question(pairs, chosen(str(record["answer"]), ["1", "2"]))


def multiple_choice(record: dict[str, Any]) -> Question:
    """ARC and OpenBookQA; most questions of ARC have four options, lettered or numbered."""
    choices = record["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    prompt = f"Question: {record['question']['stem']}\nAnswer:"
    options = [choice["text"] for choice in choices]
    return same_prompt(prompt, options, chosen(record["answerKey"], labels))


def same_prompt(prompt: str, options: list[str], answer: Any) -> Question:
    if type(answer) is not int or not 0 <= answer < len(options):
        raise ValueError(f"the label {answer!r} is none of the {len(options)} options")
    return Question([(prompt, f" {option.strip()}") for option in options], answer)


def chosen(label: str, labels: list[str]) -> int:
    if label not in labels:
        raise ValueError(f"the answer {label!r} is not one of {', '.join(labels)}")
    return labels.index(label)


def arc(title: str, name: str) -> Task:
    files = [(f"{name}-{split}.jsonl",) for split in ("Train", "Test")]
    return Task(title, name, *files, multiple_choice)


TASKS = {
    "boolq": Task("BoolQ", "boolq", ("train.jsonl",), ("dev.jsonl",), boolq),
    "piqa": Task(
        "PIQA",
        "piqa",
        ("train.jsonl", "train-labels.lst"),
        ("valid.jsonl", "valid-labels.lst"),
        piqa,
    ),
    "siqa": Task(
        "SIQA",
        "social_i_qa",
        ("train.jsonl", "train-labels.lst"),
        ("dev.jsonl", "dev-labels.lst"),
        siqa,
        first_label=1,
    ),
    "hellaswag": Task(
        "HellaSwag", "hellaswag", ("hellaswag_train.jsonl",), ("hellaswag_val.jsonl",), hellaswag
    ),
    "winogrande": Task("WinoGrande", "winogrande", ("train_xl.jsonl",), ("dev.jsonl",), winogrande),
    "arc_easy": arc("ARC-e", "ARC-Easy"),
    "arc_challenge": arc("ARC-c", "ARC-Challenge"),
    "obqa": Task("OBQA", "openbookqa", ("train.jsonl",), ("test.jsonl",), multiple_choice),
}


def load(data: Path, name: str) -> tuple[list[Question], list[Question]]:
    """Return a task's questions to train on and those held out."""
    task = TASKS[name]
    return read(data, task, task.train), read(data, task, task.held_out)


def read(data: Path, task: Task, files: tuple[str, ...]) -> list[Question]:
    """Read a split. What is wrong with it is said with its file and line."""
    path = existing(data, task.folder, files[0])
    labels = read_labels(existing(data, task.folder, files[1]), task) if files[1:] else None
    questions = []
    for line_number, record in records(path):
        where = f"{task.folder}/{path.name}, line {line_number}"
        if labels is not None:
            if len(labels) < line_number:
                raise ValueError(f"{where}: {files[1]} has only {len(labels)} labels")
            record["label"] = labels[line_number - 1]
        try:
            questions.append(task.question(record))
        except KeyError as error:
            raise ValueError(f"{where}: no field {error}; it has {', '.join(record)}") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not questions:
        raise ValueError(f"{task.folder}/{path.name} has no questions")
    if labels is not None and len(labels) > line_number:
        raise ValueError(f"{task.folder}/{files[1]} has {len(labels)} labels, more than questions")
    return questions


def existing(data: Path, folder: str, name: str) -> Path:
    path = data / folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder}/{name} is not in --data")
    return path


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file that has one a line."""
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, 1):
            try:
                yield line_number, json.loads(line)
            except json.JSONDecodeError as error:
                where = f"{path.parent.name}/{path.name}, line {line_number}"
                raise ValueError(f"{where}: not JSON: {error}") from error


def read_labels(path: Path, task: Task) -> list[int]:
    try:
        return [int(line) - task.first_label for line in path.read_text().split()]
    except ValueError as error:
        raise ValueError(f"{task.folder}/{path.name}: {error}") from error
