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
_VERBS = {"+": ("found", "won"), "-": ("lost", "sold")}
_OTHER_NAMES = ("Ian", "Joy", "Kim", "Leo", "Mia", "Ned")
_OTHER_THINGS = ("eggs", "bags", "toys", "jars")
_OTHER_VERBS = {"+": ("found", "made", "got", "drew"), "-": ("sold", "gave", "ate", "broke")}


class Problem(NamedTuple):
    """A question and what is to be written after it, the last byte a line end."""

    question: str
    answer: str


def one_step_problems(seed: int) -> Iterator[Problem]:
    """Sums and differences without end: three of four bare (``16-4=12``), the others in words.

    ``Ann had 9 pens, found 7: `` is answered with ``9+7=16``.
    """
    draw = random.Random(seed)
    while True:
        # Small numbers come more often: from copying over counting, adding is learned in minutes.
        sign, b = draw.choice("+-"), draw.randint(0, draw.randint(0, 9))
        bare = draw.random() < 0.75
        a = draw.randint(0, 18 if bare else 9)
        result = _result(a, sign, b)
        if result < 0:
            continue
        if bare:
            yield Problem(f"{a}{sign}{b}=", f"{result}\n")
            continue
        name, thing, verb = map(draw.choice, (_NAMES, _THINGS, _VERBS[sign]))
        yield Problem(f"{name} had {a} {thing}, {verb} {b}: ", f"{a}{sign}{b}={result}\n")


def chain_problems(seed: int, split: str) -> Iterator[Problem]:
    """Problems of two or three steps without end, those of "train", "validation" or "test".

    Half of them tell of another thing as well, at any place: ``Ian had 9 eggs, found 7, lost 5
    toys, sold 4: `` is answered with ``9+7=16-4=12``. The answer decides the split, so that none
    that is asked for at a test was trained on in other words.
    """
    draw = random.Random(seed)
    sides = {0: "test", 1: "validation"}
    while True:
        first, *numbers = (draw.randint(0, 9) for _ in range(draw.choice((3, 4))))
        steps = [(draw.choice("+-"), number) for number in numbers]
        answer = _chain(first, steps)
        if answer is None or sides.get(zlib.crc32(answer.encode()) % 10, "train") != split:
            continue
        thing, other = draw.sample(_OTHER_THINGS, k=2)
        told = [f"{draw.choice(_OTHER_VERBS[sign])} {number}" for sign, number in steps]
        if draw.random() < 0.5:
            verb = draw.choice(_OTHER_VERBS[draw.choice("+-")])
            told.insert(draw.randint(0, len(told)), f"{verb} {draw.randint(0, 9)} {other}")
        name = draw.choice(_OTHER_NAMES)
        yield Problem(f"{name} had {first} {thing}, {', '.join(told)}: ", answer)


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


def _chain(first: int, steps: list[tuple[str, int]]) -> str | None:
    """The steps with what there is after each; None if that is ever beyond 0 to 18."""
    text, there = str(first), first
    for sign, number in steps:
        there = _result(there, sign, number)
        if not 0 <= there <= 18:
            return None
        text += f"{sign}{number}={there}"
    return text + "\n"


def _result(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b
