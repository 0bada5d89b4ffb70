"""Arithmetic in words: problems, their answers, and which of them are held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_NAMES = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay")
_THINGS = ("pens", "cups", "hats", "keys")
_OTHER_NAMES = ("Ian", "Joy", "Kim", "Leo", "Mia", "Ned")
_OTHER_THINGS = ("eggs", "bags", "toys", "jars")
_VERBS = {"+": ("found", "won"), "-": ("lost", "sold")}


class Problem(NamedTuple):
    """A question and what is to be written after it, the last byte a line end."""

    question: str
    answer: str


def digits(number: int) -> str:
    """A result as it is written: two digits, the least significant one first, as carries go."""
    return f"{number:02d}"[::-1]


def one_step_problems(seed: int) -> Iterator[Problem]:
    """Sums and differences without end: four of five bare (``70+5=21``), the others in words."""
    draw = random.Random(seed)
    while True:
        # Small numbers come more often: from copying over counting, adding is learned in minutes.
        sign, b = draw.choice("+-"), draw.randint(0, draw.randint(0, 9))
        bare = draw.random() < 0.8
        a = draw.randint(0, 18 if bare else 9)
        result = _result(a, sign, b)
        if result < 0:
            continue
        verb = "gets" if sign == "+" else "gives"
        name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
        words = f"{name} has {a} {thing} and {verb} {b}: "
        yield Problem(f"{digits(a)}{sign}{b}=" if bare else words, f"{digits(result)}\n")


def two_step_problems(seed: int, split: str) -> Iterator[Problem]:
    """Problems of two steps without end, those of "train", "validation" or "test".

    Numbers and operations decide the split, so that no answer that is asked for at a test was
    trained on under another name.
    """
    draw = random.Random(seed)
    while True:
        numbers = [draw.randint(0, 9) for _ in range(3)]
        signs = draw.choices("+-", k=2)
        first = _result(numbers[0], signs[0], numbers[1])
        second = _result(first, signs[1], numbers[2])
        sides = {0: "test", 1: "validation"}
        side = zlib.crc32(f"{numbers} {signs}".encode()) % 10
        if min(first, second) < 0 or sides.get(side, "train") != split:
            continue
        verbs = [draw.choice(_VERBS[sign]) for sign in signs]
        name, thing = draw.choice(_OTHER_NAMES), draw.choice(_OTHER_THINGS)
        a, b, c = numbers
        question = f"{name} had {a} {thing}, {verbs[0]} {b}, {verbs[1]} {c}: "
        yield Problem(question, f"{digits(first)} {digits(second)}\n")


def tokens_of(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Bytes and labels of problems: (problems, longest) each; labels are -100 but on answers."""
    rows = [_row(problem) for problem in problems]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (row, answer) in enumerate(rows):
        tokens[i, : len(row)], labels[i, : len(row)] = row, answer
    return tokens, labels


def stream_of(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Bytes and labels of problems one after the other: (bytes,) each."""
    text = "".join(problem.question + problem.answer for problem in problems)
    asked = b"".join(b"\1" * len(p.question) + b"\0" * len(p.answer) for p in problems)
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    is_asked = torch.frombuffer(bytearray(asked), dtype=torch.bool)
    return tokens, tokens.masked_fill(is_asked, -100)


def _row(problem: Problem) -> tuple[Tensor, Tensor]:
    tokens = torch.tensor(list((problem.question + problem.answer).encode()))
    labels = tokens.clone()
    labels[: len(problem.question)] = -100
    return tokens, labels


def _result(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b
