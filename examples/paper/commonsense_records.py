"""The same tasks as LLM-Adapters writes them: instructions, and answers that are generated.

One file to train on (commonsense_170k.json) and for each task a test.json, all lists of objects
with "instruction", "input", "output" ("the correct answer is true") and "answer" ("true").
BoolQ comes without its passage, so these scores do not compare with those of `commonsense_tasks`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINING = "commonsense_170k.json"

TRUTH = ("true", "false")
ANSWERS = tuple(f"answer{i}" for i in range(1, 6))
ENDINGS = tuple(f"ending{i}" for i in range(1, 5))

# Task -> its folder, and the words that answer it.
TASKS = {
    "boolq": ("boolq", TRUTH),
    "piqa": ("piqa", ("solution1", "solution2")),
    "siqa": ("social_i_qa", ANSWERS),
    "hellaswag": ("hellaswag", ENDINGS),
    "winogrande": ("winogrande", ("option1", "option2")),
    "arc_easy": ("ARC-Easy", ANSWERS),
    "arc_challenge": ("ARC-Challenge", ANSWERS),
    "obqa": ("openbookqa", ANSWERS),
}


@dataclass(frozen=True)
class Record:
    prompt: str
    response: str
    answer: str


def prompt(instruction: str, text: str = "") -> str:
    """Return Alpaca's template up to where the response begins."""
    context = ", paired with an input that provides further context" if text else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that "
        f"appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{text}\n\n" if text else "")
        + "### Response:\n"
    )


def training(data: Path) -> list[Record]:
    """Return what is trained on, of all tasks together."""
    return read(data, TRAINING)


def held_out(data: Path, name: str) -> list[Record]:
    """Return a task's test set, whose answers are of the task."""
    folder, words = TASKS[name]
    found = read(data, f"{folder}/test.json")
    for i, record in enumerate(found):
        if record.answer not in words:
            raise ValueError(
                f"{folder}/test.json, record {i}: the answer {record.answer!r} is not one of "
                f"{', '.join(words)}"
            )
    return found


def read(data: Path, name: str) -> list[Record]:
    path = data / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in --data")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{name}: expected a list of records")
    return [record(entry, f"{name}, record {i}") for i, entry in enumerate(content)]


def record(entry: Any, where: str) -> Record:
    needed = ("instruction", "output", "answer")
    missing = [field for field in needed if not isinstance(entry, dict) or field not in entry]
    if missing:
        raise ValueError(f"{where}: no {' or '.join(map(repr, missing))}")
    text = prompt(entry["instruction"], entry.get("input", ""))
    return Record(text, entry["output"].strip(), str(entry["answer"]))


def extract(generated: str, name: str) -> str | None:
    """Return the first of a task's words in what was generated; None if there is none."""
    found = re.search("|".join(TASKS[name][1]), generated)
    return found and found.group()
