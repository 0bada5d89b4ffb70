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
    """A question and its answer, which ends with a line end."""

    question: str
    answer: str


def one_step_problems(seed: int) -> Iterator[Problem]:
    """Yield sums and differences without end: three of four bare (``16-4=12``), others in words.

    ``Ann had 9 pens, found 7: `` is answered with ``9+7=16``.
    """
    draw = random.Random(seed)
    while True:
        # Small numbers come more often: then adding is learned within minutes.
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


def two_step_problems(seed: int, split: str) -> Iterator[Problem]:
    """Yield problems of two steps without end, of the split "train", "validation" or "test".

    Half of them mention another thing as well, at any place: ``Ian had 9 eggs, found 7, broke 5
    toys, sold 4: `` is answered with ``9+7=16-4=12``. The answer decides the split: no answer of a
    test was trained on in other words.
    """
    draw = random.Random(seed)
    sides = {0: "test", 1: "validation"}
    while True:
        a, b, c = (draw.randint(0, 9) for _ in range(3))
        one, two = draw.choices("+-", k=2)
        there = _result(a, one, b)
        left = _result(there, two, c)
        answer = f"{a}{one}{b}={there}{two}{c}={left}\n"
        side = sides.get(zlib.crc32(answer.encode()) % 10, "train")
        if min(there, left) < 0 or side != split:
            continue
        thing, other = draw.sample(_OTHER_THINGS, k=2)
        told = [f"{draw.choice(_OTHER_VERBS[one])} {b}", f"{draw.choice(_OTHER_VERBS[two])} {c}"]
        if draw.random() < 0.5:
            verb = draw.choice(_OTHER_VERBS[draw.choice("+-")])
            told.insert(draw.randint(0, 2), f"{verb} {draw.randint(0, 9)} {other}")
        name = draw.choice(_OTHER_NAMES)
        yield Problem(f"{name} had {a} {thing}, {', '.join(told)}: ", answer)


def tokens_of(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Return bytes and labels, (problems, longest) each; labels are -100 except on answers."""
    rows = [_row(problem) for problem in problems]
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (row, answer) in enumerate(rows):
        tokens[i, : len(row)], labels[i, : len(row)] = row, answer
    return tokens, labels


def stream_of(problems: list[Problem]) -> tuple[Tensor, Tensor]:
    """Return bytes and labels of problems one after the other, (bytes,) each."""
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
